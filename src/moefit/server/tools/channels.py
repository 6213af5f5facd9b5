"""Parsers of reasoning: text between markers, and the channels of gpt-oss (harmony)."""

import re
from collections.abc import Generator

from moefit.server.tools.parsing import (
    CallStart,
    Content,
    Delta,
    Deltas,
    Pieces,
    Reasoning,
    StreamParser,
    arguments,
    content,
    deltas_of,
    gathered,
    ignored,
    trimmed,
)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
MESSAGE, CHANNEL, CONSTRAIN = "<|message|>", "<|channel|>", "<|constrain|>"
START, END = "<|start|>", "<|end|>"
_ENDS = (END, "<|return|>", "<|call|>", START)
HARMONY = (MESSAGE, CHANNEL, CONSTRAIN, *_ENDS)


def reasoning(pieces: Pieces[str]) -> Generator[Delta | None, None, str]:
    """Yield pieces as reasoning; return what ended them."""
    return (yield from deltas_of(pieces, Reasoning))


class ReasoningParser(StreamParser):
    """Reasoning between two markers at the beginning of an answer, then what another parser reads.

    Args:
        opens: Marker before the reasoning.
        closes: Marker behind it.
        begun: Whether the prompt ended within the reasoning.
        rest: Parser of what follows.
    """

    def __init__(self, opens: str, closes: str, *, begun: bool, rest: StreamParser):
        self._opens, self._closes, self._begun, self._rest = opens, closes, begun, rest
        super().__init__()

    def parse(self) -> Deltas:
        """Read the source to its end."""
        yield from ignored(self.source.space())
        _, begins = yield from gathered(self.source.begins(self._opens))
        if begins or self._begun:
            yield from reasoning(trimmed(self.source.until(self._closes)))
            yield from ignored(self.source.space())
        for piece in self.source.until():
            if piece is None:
                yield None
            else:
                yield from self._rest.push(piece)
        yield from self._rest.finish()


class HarmonyParser(StreamParser):
    """Channels: analysis is reasoning, a recipient makes a call, anything else is content."""

    def parse(self) -> Deltas:
        """Read the source to its end."""
        while True:
            head, marker = yield from gathered(self.source.until(MESSAGE))
            if not marker:
                if head.strip() and "<|" not in head:
                    yield Content(head)
                return
            channel, recipient = _CHANNEL.search(head), _RECIPIENT.search(head)
            body = self.source.until(*_ENDS)
            if recipient is not None:
                yield CallStart(recipient[1])
                _, first = yield from gathered(self.source.space())
                json_follows = first == "{"  # texts in it may have the markers
                body = self.source.json_value() if json_follows else trimmed(body)
                yield from arguments(body)
            elif channel is not None and channel[1] == "analysis":
                yield from reasoning(body)
            else:
                yield from content(body)
