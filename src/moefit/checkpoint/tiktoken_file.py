"""Build a tokenizer from a file of ranked tokens (tiktoken), as Kimi-K2 has it.

The file has a line per token: its bytes in base64, and its rank, which is its id. Of all neighbours
whose concatenation is a token, those with the lowest rank are joined first; as merges of byte-level
BPE these are all ways to cut a token into two others. How text is split before is in the model's
code only, which is never run, so that models must be known here.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moefit.checkpoint.gguf.tokenizer import SPLITS
from moefit.checkpoint.model_folder import read_json, read_json_or_empty

FILE = "tiktoken.model"
_CONFIG = "tokenizer_config.json"
_RESERVED = 256  # ids behind the tokens of the file
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_ranked_tokens(folder: Path) -> bool:
    """Return whether a folder's tokenizer is Kimi-K2's."""
    config = read_json_or_empty(folder / _CONFIG)
    own = config.get("tokenizer_class") == "TikTokenTokenizer"
    return own and "tokenization_kimi" in str(config.get("auto_map")) and (folder / FILE).is_file()


def read_ranked_tokens(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder for which `has_ranked_tokens` is True.

    Raises:
        ValueError: The file is damaged.
    """
    config = read_json(folder / _CONFIG)
    ranks = _ranks((folder / FILE).read_bytes())
    letters = bytes_to_unicode()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {texts[token]: rank for token, rank in ranks.items()}
    merges = [(texts[left], texts[right]) for left, right in _merges(ranks)]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(one), "isolated") for one in SPLITS["kimi-k2"]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _add_reserved(backend, config, len(ranks))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: _text(config[name]) for name in _NAMES if config.get(name)},
    )
    template = folder / "chat_template.jinja"
    tokenizer.chat_template = (
        template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    )
    return tokenizer


def _ranks(content: bytes) -> dict[bytes, int]:
    """Return the rank of each token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{FILE}, line {number}, is no token with a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < _RESERVED:
        raise ValueError(f"{FILE} has {len(ranks):,} tokens, whose ranks are not 0, 1, 2, ...")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield all pairs of tokens that make another, in the order in which they are joined."""
    for token in sorted(ranks, key=lambda one: ranks[one]):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _add_reserved(backend: Tokenizer, config: Mapping[str, Any], first: int) -> None:
    """Add the tokens of the reserved ids, in order."""
    named = {int(key): one for key, one in config.get("added_tokens_decoder", {}).items()}
    ids = range(first, first + _RESERVED)
    if odd := sorted(named.keys() - set(ids)):
        raise ValueError(f"{_CONFIG} names the token {odd[0]}, which is not among {ids}")
    tokens = [_reserved(named.get(number, f"<|reserved_token_{number}|>")) for number in ids]
    backend.add_tokens(tokens)
    names = [token.content for token in tokens]
    for number, name in zip(ids, names, strict=True):
        if backend.token_to_id(name) != number:
            raise ValueError(f"{_CONFIG} names the token {number} {name!r}, as another is named")
    for key in _NAMES:
        if config.get(key) and (name := _text(config[key])) not in names:
            raise ValueError(f"{_CONFIG} has {key}={name!r}, which is not among its tokens")


def _reserved(token: Any) -> AddedToken:
    """Return a token; ones that are not special stay in text without special tokens."""
    special = not isinstance(token, Mapping) or bool(token.get("special", True))
    return AddedToken(_text(token), normalized=False, special=special)


def _text(token: Any) -> str:
    """Return the text of a special token, which may be an object."""
    return str(token["content"] if isinstance(token, Mapping) else token)
