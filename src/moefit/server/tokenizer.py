"""Tokenize, detokenize and apply chat templates for requests.

`RequestTokenizer` validates texts and token ids. A chat template comes with the checkpoint and is
untrusted: it is rendered in a separate process (`template_worker.py`) with time and memory limits.
The process is kept between requests and replaced when it ends.
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
from collections.abc import Callable, Mapping, Sequence
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
"""Address space of the process, which uses about 20 MiB when idle."""
RENDER_RESIDENT = 32 << 20
"""Part of the memory budget: ordinary conversations use no more."""
RENDER_SECONDS = 5.0
_GRACE = 2.0  # seconds for the process to end itself after the time limit
_ENVIRONMENT = ("LANG", "LC_ALL", "LC_TIME", "TZ", "PATH", "LD_LIBRARY_PATH")
"""Environment variables passed on: a template must not see keys and tokens."""


_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Return freed memory to the system immediately."""
# An isolated interpreter has no site-packages, so pass the path of Jinja.
_START = (
    "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_path(sys.argv[2], "
    "run_name='__main__')"
)
_PATHS = (str(Path(jinja2.__file__).parent.parent), template_worker.__file__)


class _ProcessEndedError(Exception):
    """The template process ended without a response."""


class _Process:
    """A process that has compiled one template."""

    def __init__(self, memory: int, seconds: float):
        self._seconds, self._memory, self._timed_out = seconds, memory, False
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, *_PATHS, str(memory), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _MALLOC,
            start_new_session=True,  # so that Ctrl-C reaches the server only
        )
        self.end = weakref.finalize(self, _terminate, self._child)

    def request(self, value: Any) -> Any:
        """Send a value and return the response. Raises _ProcessEndedError."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(frame(value))
            self._child.stdin.flush()
        except OSError as error:
            raise _ProcessEndedError from error
        return template_worker.parse_frame(self._read(self._child.stdout.fileno()))

    def _read(self, descriptor: int) -> bytes:
        """Return the body of one frame."""
        until, got = monotonic() + self._seconds + _GRACE, bytearray()
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while len(got) < 8 or len(got) < 8 + int.from_bytes(got[:8]):
            left = until - monotonic()
            if left <= 0 or not ready.poll(1000 * left):
                self._timed_out = True
                self._child.kill()
                raise _ProcessEndedError
            more = os.read(descriptor, 1 << 20)
            if not more or len(got) > self._memory:
                raise _ProcessEndedError
            got += more
        return bytes(got[8:])

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._child.poll() is not None

    def kill(self) -> None:
        """Kill the process; may be called while another thread waits for a response."""
        self._child.kill()

    def exit_reason(self) -> str:
        """Terminate the process if it is still running, and return why it ended."""
        try:
            code = self._child.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        if self._timed_out or code == -signal.SIGALRM:
            return f"did not end within {self._seconds:g} seconds"
        return f"crashed its process (exit status {code})"


def _terminate(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                continue  # unsent data has no reader


class Renderer:
    """Render one chat template. Thread-safe; the process starts with the first conversation.

    Args:
        source: Jinja source of the template.
        memory: Address space of the process, in bytes.
        seconds: Time limit of one rendering.
    """

    def __init__(self, source: str, *, memory: int = RENDER_BYTES, seconds: float = RENDER_SECONDS):
        self.source, self._memory, self._seconds = source, memory, seconds
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._closed = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any],
        *,
        longest: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation.

        Args:
            messages: Messages with `role`, `content` (text or a list of text parts) and any other
                keys that the template reads.
            values: Other variables of the template.
            longest: Largest number of characters to return.
            tools: Definitions of tools, as templates expect them.

        Raises:
            ConfigError: If the template rejects the messages, drops the text of one or the tools,
                or exceeds the time or memory limit.
            RequestTooLargeError: If the result is longer than `longest`.
        """
        request = {"messages": list(messages), "values": dict(values), "longest": longest}
        request["tools"] = None if tools is None else list(tools)
        with self._lock:
            answer = self._request(request)
        if (text := answer.get("text")) is not None:
            return text
        if "long" in answer:
            raise RequestTooLargeError(
                f"the conversation is {answer['long']:,} characters after rendering, but at most "
                f"{longest:,} fit; shorten it"
            )
        if "tools" in answer:
            raise ConfigError(
                "the model's chat template does not show tools to the model; omit tools"
            )
        if "lost" in answer:
            raise ConfigError(_lost_message(answer["lost"], messages))
        raise ConfigError(f"the chat template rejects these messages: {answer['refused']}")

    def close(self) -> None:
        """End the process, even while it is rendering."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._close_process()

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._ready().request(request)
        except _ProcessEndedError as error:
            why = "" if self._process is None else self._process.exit_reason()
            self._process = None
            if self._closed:
                raise RefusedError("the server is shutting down") from error
            raise ConfigError(f"the model's chat template {why} with these messages") from error
        if "memory" in answer:
            self._close_process()
            raise ConfigError(
                "the model's chat template needs more than "
                f"{self._memory >> 20} MiB of memory for these messages"
            )
        return answer

    def _ready(self) -> _Process:
        """Return the process, started and with the template compiled."""
        if self._closed:
            raise _ProcessEndedError
        if self._process is not None and self._process.ended:
            self._close_process()  # it was killed, for example by the OOM killer
        if self._process is None:
            self._process = _Process(self._memory, self._seconds)
            if wrong := self._request({"template": self.source}):
                self._close_process()
                raise ConfigError(f"the model's chat template is invalid: {wrong['refused']}")
        return self._process

    def _close_process(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None


def _lost_message(index: int, messages: Sequence[Mapping[str, Any]]) -> str:
    role = messages[index]["role"]
    other = "; put it in a user message" if role == "system" else ""
    if messages[index].get("tool_calls"):
        return f"messages[{index}].tool_calls: the model's chat template does not write these calls"
    return (
        f"messages[{index}].content: the model's chat template drops the {role}'s text, given "
        f"as text or as a list of parts{other}"
    )


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MAX_NORMALIZED = 64 << 20  # characters of a text between a tokenizer's rules
_MAX_GROWTH = 4096.0  # factor of all rules; real tokenizers reach some hundreds
_MAX_RULES = 256
_REPLACEMENT = "\ufffd"
_CACHED_TOKENS = 8192  # tokens whose text is cached; 3 MiB, part of the memory estimate
_CHUNK = 4096  # tokens converted to Python strings at a time
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class RequestTokenizer:
    """The model's tokenizer, with validation. Thread-safe.

    Args:
        backend: transformers tokenizer; None if the model has none.
        size: Number of token ids that the model knows.
        max_tokens: Tokens of a request at most, or a function that returns them; longer texts are
            rejected before tokenizing.

    Raises:
        ConfigError: If the tokenizer's rules may lengthen a text thousands of times.
    """

    def __init__(
        self,
        backend: PreTrainedTokenizerBase | None,
        *,
        size: int,
        max_tokens: int | Callable[[], int],
    ):
        self.backend, self.size, self._most = backend, size, max_tokens
        self._lock = threading.Lock()
        self._renderer: Renderer | None = None
        self._closed = False
        self._longest = 1 if backend is None else _longest(backend)
        self._growth = 1.0 if backend is None else _checked_growth(backend)
        self.text_and_bytes = lru_cache(maxsize=_CACHED_TOKENS)(self._text_and_bytes)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self.backend is not None and bool(self.backend.chat_template)

    @property
    def _max_tokens(self) -> int:
        return self._most if isinstance(self._most, int) else self._most()

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Text to tokenize.
            special: Whether to add the special tokens that the model expects around it.

        Raises:
            RequestTooLargeError: If the text certainly has too many tokens, or the tokenizer's
                rules may make it too long.
            ConfigError: If there is no tokenizer or the text is not valid Unicode.
        """
        tokenizer = self._required()
        if not is_unicode(text):
            raise ConfigError("the text contains an unpaired surrogate")
        if len(text) > self._max_tokens * self._longest:
            raise RequestTooLargeError(
                f"a text of {len(text):,} characters exceeds the {self._max_tokens:,} tokens that "
                "prompt and completion may have together; shorten it"
            )
        if len(text) * self._growth > _MAX_NORMALIZED:
            raise RequestTooLargeError(
                f"a text of {len(text):,} characters may become {self._growth:g} times as long by "
                "the tokenizer's rules before it is split into tokens; shorten it"
            )
        with self._lock:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise ConfigError if a token id is outside the vocabulary."""
        if unknown := next((one for one in ids if not 0 <= one < self.size), None):
            raise ConfigError(f"token {unknown} does not exist; valid ids are 0 to {self.size - 1}")

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return a conversation rendered by the chat template, with the generation prompt.

        Args:
            messages: Messages with `role`, and `content` as text or a list of text parts.
            values: Variables of the template, such as `enable_thinking`.
            tools: Definitions of tools, as templates expect them.

        Raises:
            ConfigError: If there is no template, or it rejects the messages, drops text or exceeds
                its limits.
            RequestTooLargeError: If the result is too long for the model.
        """
        if not self.has_template:
            raise ConfigError(
                "this model has no chat template and only continues text; use /v1/completions"
            )
        given = {**self._required().special_tokens_map, **(values or {})}
        given["add_generation_prompt"] = True
        longest = self._max_tokens * self._longest
        return self._rendering().render(messages, given, longest=longest, tools=tools)

    def close(self) -> None:
        """End the process that renders conversations."""
        with self._lock:
            self._closed, renderer = True, self._renderer
        if renderer is not None:
            renderer.close()

    @property
    def template(self) -> str:
        """The tokenizer's current chat template. Raises ConfigError if there is none."""
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
        """Return the text of tokens; `special` includes special tokens."""
        if self.backend is None:
            return ""
        text = self.backend.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def raw(self, token: int) -> bytes:
        """Return a token's bytes, which may be an incomplete character."""
        return self.text_and_bytes(token)[1]

    def name(self, token: int) -> str:
        """Return a token as text, or like OpenAI as `bytes:\\xe2\\x82` if it is not UTF-8."""
        return self.text_and_bytes(token)[0]

    def _text_and_bytes(self, token: int) -> tuple[str, bytes]:
        if self.backend is None or token >= self.size:
            return f"token_id:{token}", b""
        # Decode the token twice, because some decoders drop the first word's leading space.
        once = self.text([token], special=True)
        text = self.text([token, token], special=True)[len(once) :]
        if _REPLACEMENT not in text:
            return text, text.encode()
        raw = _bytes_of(str(self.backend.convert_ids_to_tokens(token)))
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def _required(self) -> PreTrainedTokenizerBase:
        if self.backend is None:
            raise ConfigError("this model has no tokenizer; give the prompt as token ids")
        return self.backend


def _longest(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of the longest token, without building the whole vocabulary in memory."""
    longest = max((len(one.content) for one in tokenizer.added_tokens_decoder.values()), default=1)
    for start in range(0, len(tokenizer), _CHUNK):
        ids = list(range(start, min(start + _CHUNK, len(tokenizer))))
        tokens = tokenizer.convert_ids_to_tokens(ids)
        longest = max(longest, *(len(token or "") for token in tokens))
    return longest


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode; JSON can contain unpaired surrogates.

    >>> is_unicode("\\ud83d")
    False
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(piece: str) -> bytes:
    """Return the bytes of a vocabulary entry, in byte-fallback or byte-level notation.

    >>> _bytes_of("<0xE2>"), _bytes_of("âĤ")
    (b'\\xe2', b'\\xe2\\x82')
    """
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def _checked_growth(tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the largest factor by which normalizer and pre-tokenizer may lengthen a text.

    The rules come with the checkpoint: thirty that double a letter turn it into a gigabyte.

    Raises:
        ConfigError: If the factor or the number of rules is beyond any legitimate use.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    growths = []
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        rules = [one for name in names for one in _rules(getattr(backend, name, None))]
        growth = prod(map(_growth, rules))
        if growth > _MAX_GROWTH or len(rules) > _MAX_RULES:
            raise ConfigError(
                f"the tokenizer's {' and '.join(names)} have {len(rules):,} rules, which may make "
                f"a text {growth:g} times as long; at most {_MAX_RULES} rules and "
                f"{_MAX_GROWTH:g} times are accepted, so tokenizer.json is damaged or malicious"
            )
        growths.append(growth)
    return growths[0]


def _rules(part: Any) -> list[dict[str, Any]]:
    """Return the rules of a tokenizer component, flattened, as tokenizer.json has them."""
    if part is None:
        return []
    try:
        found = [json.loads(part.__getstate__())]
    except Exception:  # noqa: BLE001 - components written in Python are not part of a checkpoint
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
    """Return the largest factor by which a rule may lengthen a text, in bytes.

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
    """Return the length in bytes of the longest replacement in a SentencePiece map."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=1) or 1)
