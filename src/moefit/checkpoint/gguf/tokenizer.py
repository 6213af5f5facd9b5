"""Build a tokenizer from the vocabulary in a GGUF file's metadata.

llama.cpp has its own implementation of each kind of tokenizer and of each known way to split text
into words; the same is built here with the `tokenizers` library. What `gguf/vocabulary.py` writes,
this reads back. Kinds and splits that are not known here are refused: the model would read other
tokens than it was trained on.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moefit.checkpoint.gguf.header import GgufHeader, StoredList
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief

_NO_VOCABULARY = ("no_vocab", "none")
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_SPACES = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_SYMBOLS = f" ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|{_SPACES}"
_CASED = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+%s|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*%s"
)
_SLASHES = f" ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_SPACES}"
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_QWEN2 = f"{_ENDINGS}|{_LETTERS}|\\p{{N}}|{_SYMBOLS}"
_QWEN35 = (  # marks belong to words
    f"{_ENDINGS}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}|"
    f" ?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*|{_SPACES}"
)
_LLAMA3 = f"{_ENDINGS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_SYMBOLS}"
_GPT4O = f"{_CASED % (f'{_ENDINGS}?', f'{_ENDINGS}?')}|\\p{{N}}{{1,3}}|{_SLASHES}"
_TEKKEN = f"{_CASED % ('', '')}|\\p{{N}}|{_SLASHES}"
_DEEPSEEK = (
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
    f"[\\p{{L}}\\p{{M}}]+| ?[\\p{{P}}\\p{{S}}]+[\\r\\n]*|{_SPACES}",
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
# Cased letters except mathematical ones, then signs of ASCII and their wide forms.
_DEEPSEEK_LLM = (
    "[\\r\\n]",
    "\\s?(?:(?![\U0001d400-\U0001d7ff])[\\p{Lu}\\p{Ll}\\p{Lt}])+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    "\\s+$",
    _HAN,
    "\\p{N}+",
)
_DEEPSEEK_CODER = ("[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", _HAN, "\\p{N}")
_CASES = (  # capitals, then small letters, without Han
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]%s"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]%s"
)
_KIMI = (
    f"\\p{{Han}}+|{_CASES % ('*', '+')}{_ENDINGS}?|{_CASES % ('+', '*')}{_ENDINGS}?|"
    f"\\p{{N}}{{1,3}}|{_SYMBOLS}"
)
_DEFAULT = ("[\\p{P}\\$\\+<=>\\^~\\|]+", _GPT2, "\\p{N}+", "[0-9][0-9][0-9]")
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "mpt": (_GPT2,),
    "smollm": ("\\p{N}", _GPT2),
    "refact": ("\\p{N}", _GPT2),
    "starcoder": ("\\p{N}", _GPT2),
    "qwen2": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "gpt-4o": (_GPT4O,),
    "minimax-m2": (_GPT4O,),
    "tekken": (_TEKKEN,),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK,
    "kimi-k2": (_KIMI,),
    "default": _DEFAULT,
}
"""Regular expressions that split text before byte-level BPE, one after the other, by llama.cpp's
name."""
IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3", "glm4", "tekken")
"""Splits after which a word of the vocabulary is a token, whatever the merges."""
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_NO_BOS = ("chatglm-bpe", "glm4")
_UNUSED = re.compile(r"\[PAD\d+\]")
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_NAMES = ("bos", "eos", "unk", "pad")


def has_vocabulary(header: GgufHeader) -> bool:
    """Return whether a file has a tokenizer of any kind."""
    kind = header.metadata.get("tokenizer.ggml.model")
    return kind is not None and kind not in _NO_VOCABULARY


def vocabulary_size(header: GgufHeader) -> tuple[int, int]:
    """Return the number of tokens and merges, and the bytes of their texts."""
    entries, nbytes = 0, 0
    for name in ("tokens", "merges"):
        match header.metadata.get(f"tokenizer.ggml.{name}"):
            case StoredList() as found:
                entries, nbytes = entries + found.length, nbytes + found.nbytes
            case list() as found:
                entries += len(found)
                nbytes += sum(8 + len(str(one)) for one in found)
    return entries, nbytes


def tokenizer_of(header: GgufHeader) -> PreTrainedTokenizerBase:
    """Return the tokenizer.

    Raises:
        CheckpointError: There is none, or it is damaged.
        UnsupportedModelError: It is of a kind, or splits text in a way, that is not known.
    """
    if not has_vocabulary(header):
        raise CheckpointError(
            f"{header.path} has no tokenizer, so that it can neither read nor write text; the "
            "model itself takes token ids (moefit.load in Python)"
        )
    try:
        vocabulary = _Vocabulary.of(header)
        build = _build_byte_level if vocabulary.model == "gpt2" else _build_sentencepiece
        return _wrapped(build(vocabulary), vocabulary)
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"the tokenizer in {header.path} cannot be read: {in_brief(error)}; copy or download "
            "the file again"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """The metadata about the tokenizer."""

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, str]
    adds: dict[str, bool]
    chat_template: str | None

    @classmethod
    def of(cls, header: GgufHeader) -> "_Vocabulary":
        metadata = header.metadata
        model = str(metadata["tokenizer.ggml.model"])
        if model not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"{header.path} has a tokenizer of kind {model!r}; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) can be read. Give the model that the file was made from"
            )
        split = str(metadata.get("tokenizer.ggml.pre", "default"))
        if model == "gpt2" and split not in SPLITS:
            raise UnsupportedModelError(
                f"{header.path} has a tokenizer that splits text as {split!r}; known are "
                f"{', '.join(SPLITS)}. Give the model that the file was made from"
            )
        tokens = header.listed("tokenizer.ggml.tokens") or []
        types = header.listed("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        scores = header.listed("tokenizer.ggml.scores") or []
        if (
            not tokens
            or len(types) != len(tokens)
            or (model == "llama" and len(scores) < len(tokens))
        ):
            raise ValueError(
                f"it has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores"
            )
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _NAMES}
        if model == "llama":
            ids = {"bos": 1, "eos": 2, "unk": 0} | {k: v for k, v in ids.items() if v is not None}
        template = metadata.get("tokenizer.chat_template")
        return cls(
            model=model,
            split=split,
            tokens=tokens,
            types=types,
            merges=header.listed("tokenizer.ggml.merges") or [],
            scores=scores,
            special={
                name: tokens[one]
                for name, one in ids.items()
                if isinstance(one, int) and 0 <= one < len(tokens)
            },
            adds={
                "bos": bool(
                    metadata.get(
                        "tokenizer.ggml.add_bos_token", model == "llama" or split in _ADDS_BOS
                    )
                ),
                "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
                "space": bool(metadata.get("tokenizer.ggml.add_space_prefix", model == "llama")),
            },
            chat_template=template if isinstance(template, str) else None,
        )

    def ids(self) -> dict[str, int]:
        """Return the id of each token, without placeholders of unused ids."""
        return {
            text: number
            for number, text in reversed(list(enumerate(self.tokens)))  # the first one counts
            if self.types[number] in (_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE)
            or not _UNUSED.fullmatch(text)
        }

    def added(self) -> Iterator[AddedToken]:
        """Yield the tokens that are found in texts before anything else."""
        for text, type in zip(self.tokens, self.types, strict=True):
            if type in (_CONTROL, _USER):
                yield AddedToken(text, special=type == _CONTROL, normalized=False)


def _build_byte_level(found: _Vocabulary) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in found.merges]
    backend = Tokenizer(
        models.BPE(
            vocab=found.ids(),
            merges=merges,  # pyright: ignore[reportArgumentType]  # pairs
            ignore_merges=found.split in IGNORES_MERGES,
        )
    )
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in SPLITS[found.split]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=found.adds["space"], use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(found: _Vocabulary) -> Tokenizer:
    ids = found.ids()
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(found, ids),
            byte_fallback=_BYTE in found.types,
            unk_token=found.special.get("unk"),
            fuse_unk=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    prefix = [normalizers.Prepend("▁")] if found.adds["space"] else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(content=" ", left=1)] if found.adds["space"] else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(found: _Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to make a token of two others, those with the highest score first."""
    pieces = {text for text, number in ids.items() if found.types[number] == _NORMAL}
    ranked: list[tuple[float, int, tuple[str, str]]] = []
    for text in pieces:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                number = ids[text]
                ranked.append((-found.scores[number], number, (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _wrapped(backend: Tokenizer, found: _Vocabulary) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its special tokens, and what it puts around texts."""
    added = list(found.added())
    backend.add_special_tokens([one for one in added if one.special])
    backend.add_tokens([one for one in added if not one.special])
    first = found.special.get("bos") if found.adds["bos"] and found.split not in _NO_BOS else None
    last = found.special.get("eos") if found.adds["eos"] else None
    around = [one for one in (first, last) if one is not None]
    if around:
        single = [*([first] if first else []), "$A", *([last] if last else [])]
        double = [*single, *([f"{first}:1"] if first else []), "$B:1"]
        double += [f"{last}:1"] if last else []
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair=double,
            special_tokens=[(one, backend.token_to_id(one)) for one in sorted(set(around))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=found.chat_template,
        **{f"{name}_token": text for name, text in found.special.items()},
    )
