"""Chat templates, rendered in a process of their own.

A template comes with the checkpoint: it may loop for ever, or ask for gigabytes. Owns the process
that renders it (`template_worker`), what that may take, and what is said when it takes more. The
process is kept between requests, and one that has ended is replaced.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import jinja2

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
