"""Convert the text of requests to tokens and back, and apply chat templates.

`RequestTokenizer` checks token ids and texts and names what is wrong. A chat template comes with
the checkpoint and is untrusted: it is rendered in a process of its own (`template_worker.py`) with
limits on time and memory, which is kept between requests and replaced when it ends.
"""

import base64
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moefit.errors import ConfigError, RefusedError, RequestTooLargeError
from moefit.server import template_worker
from moefit.server.template_worker import frame

RENDER_BYTES = 192 << 20
"""Address space of the process; at rest it has about 20 MiB of memory."""
RENDER_RESIDENT = 32 << 20
"""What a memory budget counts for the process: ordinary conversations take no more."""
RENDER_SECONDS = 5.0
_GRACE = 2.0  # seconds for the process to notice by itself that it has taken too long
_KEPT = ("LANG", "LC_ALL", "LC_TIME", "TZ", "PATH", "LD_LIBRARY_PATH")
"""Variables that the process sees: a template has no use for keys and tokens."""


_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Lets memory that is freed go back to the system at once."""
# A bare interpreter finds no libraries by itself: it is told where Jinja is.
_START = (
    "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_path(sys.argv[2], "
    "run_name='__main__')"
)
_PLACES = (str(Path(jinja2.__file__).parent.parent), template_worker.__file__)


class _EndedError(Exception):
    """The process has ended instead of answering."""


class _Process:
    """The process that has compiled one template."""

    def __init__(self, memory: int, seconds: float):
        self._seconds, self._memory, self._late = seconds, memory, False
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, *_PLACES, str(memory), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | _MALLOC,
            start_new_session=True,  # an interrupt at the terminal is for the server alone
        )
        self.end = weakref.finalize(self, _end, self._child)

    def ask(self, value: Any) -> Any:
        """Return what the process answers. Raises _EndedError."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(frame(value))
            self._child.stdin.flush()
        except OSError as error:
            raise _EndedError from error
        return template_worker.parsed(self._read(self._child.stdout.fileno()))

    def _read(self, descriptor: int) -> bytes:
        """Return one frame's bytes."""
        until, got = monotonic() + self._seconds + _GRACE, bytearray()
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while len(got) < 8 or len(got) < 8 + int.from_bytes(got[:8]):
            left = until - monotonic()
            if left <= 0 or not ready.poll(1000 * left):
                self._late = True
                self._child.kill()
                raise _EndedError
            more = os.read(descriptor, 1 << 20)
            if not more or len(got) > self._memory:
                raise _EndedError
            got += more
        return bytes(got[8:])

    @property
    def ended(self) -> bool:
        """Whether it is there no more."""
        return self._child.poll() is not None

    def kill(self) -> None:
        """End it while another thread asks it."""
        self._child.kill()

    def why(self) -> str:
        """Say how the process ended, and end it if it has not."""
        try:
            code = self._child.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        if self._late or code == -signal.SIGALRM:
            return f"did not end within {self._seconds:g} seconds"
        return f"made the process that renders it fail (exit status {code})"


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                continue  # what was to be written has nobody to read it


class Renderer:
    """Renders one template. Thread-safe; the process starts with the first conversation."""

    def __init__(self, source: str, *, memory: int = RENDER_BYTES, seconds: float = RENDER_SECONDS):
        self.source, self._memory, self._seconds = source, memory, seconds
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._closed = False

    def render(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *, longest: int
    ) -> str:
        """Return a conversation as the template writes it.

        Args:
            messages: with `role`, `content` (a text, or a list of text parts) and whatever else the
                template may read.
            values: the template's other variables.
            longest: the most characters that may come of it.

        Raises:
            ConfigError: the template refuses the messages, loses the text of one, or takes too much
                time or memory.
            RequestTooLargeError: more characters come of it.
        """
        asked = {"messages": list(messages), "values": dict(values), "longest": longest}
        with self._lock:
            answer = self._ask(asked)
        if (text := answer.get("text")) is not None:
            return text
        if "long" in answer:
            raise RequestTooLargeError(
                f"the conversation is {answer['long']:,} characters as the chat template writes "
                f"it, and more than {longest:,} can't fit; give a shorter one"
            )
        if "lost" in answer:
            raise ConfigError(_lost(answer["lost"], messages))
        raise ConfigError(f"the chat template refuses these messages: {answer['refused']}")

    def close(self) -> None:
        """End the process, also while it renders."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._drop()

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._ready().ask(asked)
        except _EndedError as error:
            why = "" if self._process is None else self._process.why()
            self._process = None
            if self._closed:
                raise RefusedError("the server is shutting down") from error
            raise ConfigError(f"the model's chat template {why} with these messages") from error
        if "memory" in answer:
            self._drop()
            raise ConfigError(
                "the model's chat template wants more memory than the "
                f"{self._memory >> 20} MiB that it may have for these messages"
            )
        return answer

    def _ready(self) -> _Process:
        """Return the process, which has compiled the template."""
        if self._closed:
            raise _EndedError
        if self._process is not None and self._process.ended:
            self._drop()  # by somebody else, such as the system when memory was short
        if self._process is None:
            self._process = _Process(self._memory, self._seconds)
            if wrong := self._ask({"template": self.source}):
                self._drop()
                raise ConfigError(f"the model's chat template has a mistake: {wrong['refused']}")
        return self._process

    def _drop(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None


def _lost(index: int, messages: Sequence[Mapping[str, Any]]) -> str:
    role = messages[index]["role"]
    other = "; say it in a message of the user's" if role == "system" else ""
    return (
        f"messages[{index}].content: the model's chat template leaves out what the {role} says, in "
        f"either form, a text or a list of parts{other}"
    )


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_GROWN = 64 << 20  # characters that a text may have between a tokenizer's rules
_TIMES = 4096.0  # how much longer they may make a text; those of real ones reach some hundreds
_RULES = 256
_BROKEN = "\ufffd"
_SHOWN = 8192  # tokens whose text is remembered; 3 MiB, which are in the estimate of a tokenizer
_AT_ONCE = 4096  # tokens of a vocabulary that are made into Python strings together
_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}


class RequestTokenizer:
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
