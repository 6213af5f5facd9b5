"""Translate a tokenizer into the vocabulary of a GGUF file.

llama.cpp has its own implementation of each kind of tokenizer and of each known way of splitting
text into words. A tokenizer is written if its tokenizer.json describes one of these exactly:
byte-level BPE with a known split, or BPE with byte fallback as SentencePiece has it. Anything else
is refused, since the file would load and tokenise differently. Takes a transformers tokenizer and
gives a `Vocabulary`; knows nothing of files.
"""

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from moefit.checkpoint.gguf.tokenizer import IGNORES_MERGES, SPLITS
from moefit.errors import UnsupportedModelError

# Ways to split text before byte-level BPE: llama.cpp's name of each.
_SPLITS = {
    "digits, then GPT-2's": "smollm",
    "GPT-2's": "gpt-2",
    SPLITS["qwen2"][0]: "qwen2",
    SPLITS["llama-bpe"][0]: "llama-bpe",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = ("bos", "eos", "unk", "pad")
_ADVICE = "; give --no-tokenizer for a file that takes token ids only"


class TokenType(IntEnum):
    """llama.cpp's types of tokens."""

    normal = 1
    unknown = 2
    control = 3
    user_defined = 4
    unused = 5
    byte = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A vocabulary as llama.cpp has it.

    Attributes:
        model: Kind of tokenizer: `gpt2` is byte-level BPE, `llama` SentencePiece's.
        split: How text is split into words before BPE.
        tokens: Text of each token; of unused ids, a placeholder.
        types: Type of each token.
        merges: Pairs of tokens, separated by a space, in falling order of priority; `gpt2` only.
        scores: Priority of each token as the result of a merge; `llama` only.
        special: Ids of special tokens, by `bos`, `eos`, `unk` and `pad`.
        adds_bos: Whether texts begin with `bos`.
        adds_eos: Whether texts end with `eos`.
        adds_space: Whether a space is put before texts; `llama` only.
        chat_template: Jinja template of chats, if there is one.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add the vocabulary to the metadata of a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return a tokenizer's vocabulary.

    Args:
        tokenizer: With its tokenizer.json (`is_fast`).
        size: The model's vocab_size; ids that the tokenizer leaves out are marked as unused.

    Raises:
        UnsupportedModelError: llama.cpp has no tokenizer that equals this one.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"a {type(tokenizer).__name__} has no tokenizer.json, from which the vocabulary is "
            f"written; save the tokenizer's fast form{_ADVICE}"
        )
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 - fast tokenizers only
    stored = json.loads(backend.to_str())
    if stored["model"]["type"] != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is of type {stored['model']['type']}; BPE can be written{_ADVICE}"
        )
    ids = _ids(stored)
    if max(ids.values(), default=0) >= size:
        raise UnsupportedModelError(
            f"the tokenizer has the id {max(ids.values())}, but the model's vocab_size is {size}; "
            f"use the tokenizer that the model was trained with{_ADVICE}"
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    for text, number in ids.items():
        tokens[number] = text
    of_bytes = bool(stored["model"].get("byte_fallback"))
    merges = [_pair(merge) for merge in stored["model"]["merges"]]
    return Vocabulary(
        model="llama" if of_bytes else "gpt2",
        split="default" if of_bytes else _split_name(stored),
        tokens=tokens,
        types=_types(stored, ids, size, of_bytes=of_bytes),
        merges=None if of_bytes else [f"{left} {right}" for left, right in merges],
        scores=_scores(merges, ids, size) if of_bytes else None,
        special=_special(tokenizer, size),
        **_surroundings(tokenizer),
        adds_space=of_bytes and _adds_space(stored),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _ids(stored: dict[str, Any]) -> dict[str, int]:
    added = {one["content"]: one["id"] for one in stored["added_tokens"]}
    return {**stored["model"]["vocab"], **added}


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two tokens of a merge: a list, or in older files a text with a space."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _types(stored: dict[str, Any], ids: dict[str, int], size: int, *, of_bytes: bool) -> list[int]:
    types = [TokenType.unused] * size
    for number in ids.values():
        types[number] = TokenType.normal
    for one in stored["added_tokens"]:
        types[one["id"]] = TokenType.control if one["special"] else TokenType.user_defined
    if of_bytes:
        for text, number in ids.items():
            if _BYTE.fullmatch(text):
                types[number] = TokenType.byte
        if (unknown := ids.get(stored["model"].get("unk_token"))) is not None:
            types[unknown] = TokenType.unknown
    return [int(one) for one in types]


def _scores(merges: list[tuple[str, str]], ids: dict[str, int], size: int) -> list[float]:
    """Return the rank of the first merge that makes each token, negated.

    llama.cpp merges the neighbours whose joint token has the highest score, as SentencePiece does.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(len(merges))] * size
    for text, number in ids.items():
        scores[number] = -float(ranks.get(text, len(merges)))
    return scores


def _split_name(stored: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level BPE splits text."""
    split, normalizer = _split(stored["pre_tokenizer"]), stored["normalizer"]
    # llama.cpp has no normalisation; NFC changes texts that are composed otherwise, which are rare
    known = normalizer is None or normalizer == {"type": "NFC"}
    if not known or split not in _SPLITS:
        raise UnsupportedModelError(
            "the tokenizer splits text in a way that llama.cpp does not have, or that is not known "
            f"here (normalizer {json.dumps(normalizer)[:80]}, pre_tokenizer "
            f"{json.dumps(stored['pre_tokenizer'])[:160]}){_ADVICE}"
        )
    name = _SPLITS[split]
    if bool(stored["model"].get("ignore_merges")) != (name in IGNORES_MERGES):
        raise UnsupportedModelError(
            f"the tokenizer splits text as llama.cpp's {name!r}, but with ignore_merges="
            f"{stored['model'].get('ignore_merges')}, which llama.cpp has the other way round"
            f"{_ADVICE}"
        )
    return name


def _split(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return a key of `_SPLITS`, or another text, or None."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "GPT-2's" if last.get("use_regex", True) else None
    if len(before) > 1:
        return None
    first = before[0]
    if first == {"type": "Digits", "individual_digits": True}:
        return "digits, then GPT-2's" if last.get("use_regex", True) else None
    expected = {"type": "Split", "behavior": "Isolated", "invert": False}
    if {name: first.get(name) for name in expected} != expected or last.get("use_regex", True):
        return None
    return first.get("pattern", {}).get("Regex")


def _adds_space(stored: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before texts.

    Raises:
        UnsupportedModelError: It is not of SentencePiece's form.
    """
    steps, normalizer = stored["pre_tokenizer"], stored["normalizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if not steps and parts in ([replace], [prepend, replace]):
        return parts[0] == prepend
    if not parts and (steps or {}).get("type") == "Metaspace" and not steps.get("split"):
        return steps.get("prepend_scheme") != "never"
    raise UnsupportedModelError(
        "the tokenizer has byte fallback, but treats spaces otherwise than SentencePiece "
        f"(normalizer {json.dumps(normalizer)[:120]}, pre_tokenizer {json.dumps(steps)[:120]})"
        f"{_ADVICE}"
    )


def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    return {name: one for name, one in found.items() if isinstance(one, int) and 0 <= one < size}


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return whether texts get a first and a last token, as the tokenizer does it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    assert isinstance(plain, list) and isinstance(whole, list)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos, adds_eos = whole[:1] == [bos], whole[-1:] == [eos]
    if whole != [*([bos] * adds_bos), *plain, *([eos] * adds_eos)]:
        raise UnsupportedModelError(
            f"the tokenizer writes 'a' as the ids {whole}, of which {plain} are the text; only a "
            f"first bos ({bos}) and a last eos ({eos}) can be written{_ADVICE}"
        )
    return {"adds_bos": adds_bos, "adds_eos": adds_eos}
