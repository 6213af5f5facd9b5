"""Text to tokens and back, for requests.

Owns what a prompt becomes, how a conversation is written, and how a single token is shown. Knows
nothing of HTTP. tokenizer None: a model without one, which takes and gives token ids alone.
"""

import base64
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moefit.errors import ConfigError, RefusedError, RequestTooLargeError
from moefit.server.templates import Renderer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_GROWN = 64 << 20  # characters that a text may have between a tokenizer's rules
_TIMES = 4096.0  # how much longer they may make a text; those of real ones reach some hundreds
_RULES = 256
_BROKEN = "\ufffd"
_SHOWN = 8192  # tokens whose text is remembered; 3 MiB, which are in the estimate of a tokenizer
_AT_ONCE = 4096  # tokens of a vocabulary that are made into Python strings together
_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """A model's tokens. Thread-safe; `size` counts the ids that the model knows.

    most: the most tokens of a request, so that texts that can't fit are refused unread. Raises
    ConfigError for a tokenizer whose rules make texts thousands of times longer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, size: int, most: int):
        self.tokenizer, self.size, self._most = tokenizer, size, most
        self._lock = threading.Lock()
        self._renderer: Renderer | None = None
        self._closed = False
        self._longest = 1 if tokenizer is None else _longest(tokenizer)
        self._growth = 1.0 if tokenizer is None else _checked_growth(tokenizer)
        self.show = lru_cache(maxsize=_SHOWN)(self._show)

    @property
    def has_template(self) -> bool:
        """Whether the model knows conversations."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """A text's tokens, with those that the model wants around it if `special`.

        Raises RequestTooLargeError for a text that has too many in any case, or that the tokenizer
        may make too long, ConfigError without a tokenizer.
        """
        tokenizer = self._required()
        if not is_unicode(text):
            raise ConfigError("the text has half a character: a surrogate without its other half")
        if len(text) > self._most * self._longest:
            raise RequestTooLargeError(
                f"a text of {len(text):,} characters is more than the {self._most:,} tokens that "
                "prompt and answer may have together; give a shorter one"
            )
        if len(text) * self._growth > _GROWN:
            raise RequestTooLargeError(
                f"a text of {len(text):,} characters may become {self._growth:g} times as long by "
                "the tokenizer's rules before it is split into tokens; give a shorter one"
            )
        with self._lock:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise ConfigError for a token that the model does not have."""
        if unknown := next((one for one in ids if not 0 <= one < self.size), None):
            raise ConfigError(f"there is no token {unknown}; the model's are 0 to {self.size - 1}")

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any] | None = None
    ) -> str:
        """Return a conversation as the model's chat template writes it, open for the answer.

        Args:
            messages: with `role`, and `content` as a text or a list of text parts, whichever the
                template reads.
            values: variables of the template, such as `enable_thinking`.

        Raises:
            ConfigError: there is no template, it refuses these messages, loses what one of them
                says, or takes too long.
            RequestTooLargeError: more comes of it than fits.
        """
        if not self.has_template:
            raise ConfigError(
                "this model has no chat template, so it does not know conversations; it continues "
                "text: use /v1/completions"
            )
        given = {**self._required().special_tokens_map, **(values or {})}
        given["add_generation_prompt"] = True
        longest = self._most * self._longest
        return self._rendering().render(messages, given, longest=longest)

    def close(self) -> None:
        """End the process that renders conversations."""
        with self._lock:
            self._closed, renderer = True, self._renderer
        if renderer is not None:
            renderer.close()

    @property
    def template(self) -> str:
        """The tokenizer's chat template as it is now. Raises ConfigError if there is none."""
        try:
            return self._required().get_chat_template()
        except ValueError as error:
            raise ConfigError(f"the model's chat templates can't be used: {error}") from error

    def _rendering(self) -> Renderer:
        source = self.template
        with self._lock:
            if self._closed:
                raise RefusedError("the server is shutting down")
            if self._renderer is None or self._renderer.source != source:
                self._renderer = Renderer(source)
            return self._renderer

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; `special` shows those that have none."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def raw(self, token: int) -> bytes:
        """A token's bytes, also where they are no whole character."""
        return self.show(token)[1]

    def name(self, token: int) -> str:
        """A token as text, or as OpenAI writes bytes that are none: `bytes:\\xe2\\x82`."""
        return self.show(token)[0]

    def _show(self, token: int) -> tuple[str, bytes]:
        if self.tokenizer is None or token >= self.size:
            return f"token_id:{token}", b""
        once = self.text([token], special=True)  # said twice, for a first word may lose its space
        text = self.text([token, token], special=True)[len(once) :]
        if _BROKEN not in text:
            return text, text.encode()
        raw = _bytes_of(str(self.tokenizer.convert_ids_to_tokens(token)))
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def _required(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ConfigError("this model has no tokenizer; give the prompt as token ids")
        return self.tokenizer


def _longest(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of the longest token; all as a dictionary would take tens of MiB."""
    longest = max((len(one.content) for one in tokenizer.added_tokens_decoder.values()), default=1)
    for start in range(0, len(tokenizer), _AT_ONCE):
        ids = list(range(start, min(start + _AT_ONCE, len(tokenizer))))
        tokens = tokenizer.convert_ids_to_tokens(ids)
        longest = max(longest, *(len(token or "") for token in tokens))
    return longest


def is_unicode(text: str) -> bool:
    """Whether all characters are whole; JSON can write half of one, and no tokenizer reads it.

    >>> is_unicode("\\ud83d")
    False
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(piece: str) -> bytes:
    """The bytes that a vocabulary's entry stands for, in the two ways of writing them.

    >>> _bytes_of("<0xE2>"), _bytes_of("âĤ")
    (b'\\xe2', b'\\xe2\\x82')
    """
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(character in _LEVEL for character in piece):
        return bytes(_LEVEL[character] for character in piece)
    return piece.encode()


def _checked_growth(tokenizer: PreTrainedTokenizerBase) -> float:
    """Return how many times longer the rules before the vocabulary may make a text.

    They come with the checkpoint: thirty that double a letter make a gigabyte of it. Raises
    ConfigError where they, or those of the decoder, have no use but that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    growths = []
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        rules = [one for name in names for one in _rules(getattr(backend, name, None))]
        growth = prod(map(_growth, rules))
        if growth > _TIMES or len(rules) > _RULES:
            raise ConfigError(
                f"the tokenizer's {' and '.join(names)} have {len(rules):,} rules, which may make "
                f"a text {growth:g} times as long; {_RULES} rules and {_TIMES:g} times are the "
                "most that are followed, so tokenizer.json is damaged or meant to do harm"
            )
        growths.append(growth)
    return growths[0]


def _rules(part: Any) -> list[dict[str, Any]]:
    """Return the rules of a part of a tokenizer, as tokenizer.json has them, in one list."""
    if part is None:
        return []
    try:
        found = [json.loads(part.__getstate__())]
    except Exception:  # noqa: BLE001 - parts written in Python, which no checkpoint brings
        return []
    flat = []
    while found:
        rule = found.pop()
        inner = [
            rule[name] for name in ("normalizers", "pretokenizers", "decoders") if name in rule
        ]
        found += inner[0] if inner else []
        flat += [] if inner else [rule]
    return flat


def _growth(rule: Mapping[str, Any]) -> float:
    """Return how many times longer a rule may make a text, in bytes.

    >>> _growth({"type": "Replace", "pattern": {"String": "ab"}, "content": "abab"})
    2.0
    """
    kind = rule.get("type")
    if kind == "Replace":
        content = len(rule["content"].encode())
        pattern = len(rule["pattern"].get("String", "x").encode())
        return max(1.0, content / pattern) if pattern else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(rule["prepend"].encode())
    if kind == "Precompiled":
        return _longest_mapping(rule["precompiled_charsmap"])
    if kind == "Metaspace":
        return max(1.0, float(len(rule["replacement"].encode())))
    return 2.0 if kind == "ByteLevel" else 1.0


def _longest_mapping(charsmap: str) -> float:
    """Return the bytes of the longest text that a SentencePiece map has for a character."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=1) or 1)
