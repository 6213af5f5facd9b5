"""Read a text that arrives in pieces: the base of all parsers of answers.

A parser is one generator that reads the text from its beginning and yields what becomes known; None
means that it needs more text. So a format reads straight down, and any division of a text into
pieces gives the same result.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Content:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More text of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; `id` is the format's own, if it has one."""

    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More text of the last call's arguments, which are JSON if the model wrote it correctly."""

    text: str


Delta = Content | Reasoning | CallStart | CallArguments
Deltas = Generator[Delta | None, None, None]
Pieces = Generator[str | None, None, T]
"""Yields pieces of text, or None where more is needed, and returns what ended them."""

SPACE = " \t\r\n"


class Source:
    """The text that a parser reads. What was read is gone."""

    def __init__(self) -> None:
        self._text, self._ended = "", False

    def add(self, text: str) -> None:
        """Append a piece."""
        self._text += text

    def end(self) -> None:
        """Say that nothing follows."""
        self._ended = True

    def until(self, *markers: str) -> Pieces[str]:
        """Yield the text before the first of the markers; return it, or "" at the end."""
        while True:
            found = [(self._text.find(one), -len(one), one) for one in markers if one in self._text]
            # A longer marker may begin earlier and be incomplete, or begin at the same place.
            kept = 0 if self._ended else max((_overlap(self._text, m) for m in markers), default=0)
            if found and min(found)[0] < len(self._text) - kept:
                place, _, marker = min(found)
                before, self._text = self._text[:place], self._text[place + len(marker) :]
                if before:
                    yield before
                return marker
            if ready := self._text[: len(self._text) - kept]:
                self._text = self._text[len(ready) :]
                yield ready
            if self._ended:
                return ""
            yield None

    def space(self) -> Pieces[str]:
        """Skip blanks; return the next character, which is not read, or "" at the end."""
        while True:
            self._text = self._text.lstrip(SPACE)
            if self._text or self._ended:
                return self._text[:1]
            yield None

    def blanks(self) -> Pieces[str]:
        """Yield blanks; return the next character, which is not read, or "" at the end."""
        while True:
            if piece := self._take(len(self._text) - len(self._text.lstrip(SPACE))):
                yield piece
            if self._text or self._ended:
                return self._text[:1]
            yield None

    def restore(self, text: str) -> None:
        """Put back what was read last."""
        self._text = text + self._text

    def begins(self, text: str) -> Pieces[bool]:
        """Return whether `text` follows, and read it if so."""
        while not self._ended and len(self._text) < len(text) and text.startswith(self._text):
            yield None
        if not self._text.startswith(text):
            return False
        self._text = self._text[len(text) :]
        return True

    def character(self) -> Pieces[str]:
        """Read and return one character; "" at the end."""
        while not self._text:
            if self._ended:
                return ""
            yield None
        first, self._text = self._text[0], self._text[1:]
        return first

    def json_value(self) -> Pieces[bool]:
        """Yield the text of one JSON value as it is written; return whether it is complete."""
        yield from self.space()
        depth, in_text, escaped, begun = 0, False, False, False
        while True:
            size, done = 0, False
            for character in self._text:
                if in_text:
                    size += 1
                    in_text = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                    done = not in_text and not depth
                elif (character in "]}" and not depth) or (
                    not depth and begun and character in "," + SPACE
                ):
                    if piece := self._take(size):
                        yield piece
                    return begun
                else:
                    size += 1
                    in_text = character == '"'
                    depth += (character in "[{") - (character in "]}")
                    done = character in "]}" and not depth
                begun = True
                if done:
                    break
            if piece := self._take(size):
                yield piece
            if done:
                return True
            if self._ended:
                return begun and not depth and not in_text
            yield None

    def _take(self, size: int) -> str:
        taken, self._text = self._text[:size], self._text[size:]
        return taken


def _overlap(text: str, marker: str) -> int:
    """Return how many characters at the end of a text may begin a marker, not all of it.

    >>> _overlap("a <to", "<tool>")
    3
    """
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)


def gathered(pieces: Pieces[T]) -> Generator[None, None, tuple[str, T]]:
    """Return all pieces as one text, with what ended them."""
    parts: list[str] = []
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return "".join(parts), stop.value
        if piece is None:
            yield None
        else:
            parts.append(piece)


def trimmed(pieces: Pieces[T]) -> Pieces[T]:
    """Yield pieces without the blanks at both ends of the whole."""
    held, begun = "", False
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        if piece is None:
            yield None
            continue
        text = held + piece if begun else piece.lstrip(SPACE)
        kept = text.rstrip(SPACE)
        held, begun = text[len(kept) :], begun or bool(kept)
        if kept:
            yield kept


def ignored(pieces: Pieces[T]) -> Generator[None, None, T]:
    """Return what ended pieces that nobody reads."""
    _, ended = yield from gathered(pieces)
    return ended


class StreamParser:
    """Base of the parsers: `push` text, then `finish` once."""

    def __init__(self) -> None:
        self.source = Source()
        self._running = self.parse()

    def parse(self) -> Deltas:
        """Read the source to its end."""
        raise NotImplementedError

    def push(self, text: str) -> list[Delta]:
        """Return what becomes known with more text."""
        self.source.add(text)
        return list(self._advance())

    def finish(self) -> list[Delta]:
        """Return the rest, after the last piece."""
        self.source.end()
        return list(self._advance())

    def _advance(self) -> Iterable[Delta]:
        for delta in self._running:
            if delta is None:
                return
            yield delta


class PlainParser(StreamParser):
    """All text is content."""

    def parse(self) -> Deltas:
        """Read the source to its end."""
        yield from content(self.source.until())


def deltas_of(pieces: Pieces[T], kind: Callable[[str], Delta]) -> Generator[Delta | None, None, T]:
    """Yield pieces as deltas of a kind; return what ended them."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        yield None if piece is None else kind(piece)


def content(pieces: Pieces[T]) -> Generator[Delta | None, None, T]:
    """Yield pieces as content; return what ended them."""
    return (yield from deltas_of(pieces, Content))


def arguments(pieces: Pieces[T]) -> Generator[Delta | None, None, T]:
    """Yield pieces as arguments of the current call; return what ended them."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        yield None if piece is None else CallArguments(piece)
