"""Parsers of tool calls in three shapes: JSON objects, delimited JSON, and elements per argument.

Models may write what is no call: an object without a name becomes content, and arguments that are
no JSON are passed on as they are.
"""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moefit.server.tools.parsing import (
    CallArguments,
    CallStart,
    Content,
    Delta,
    Deltas,
    Pieces,
    StreamParser,
    arguments,
    content,
    gathered,
    ignored,
    trimmed,
)

_ARGUMENTS = ("arguments", "parameters")


class JsonCalls(StreamParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or an array of such objects.

    Args:
        opens: Markers before an object or array.
        closes: Marker behind it; "" if there is none.
        named: Whether a name may follow the marker instead, then `[ARGS]` and the arguments.
    """

    def __init__(self, opens: Sequence[str], closes: str, *, named: bool = False):
        self._opens, self._closes, self._named = opens, closes, named
        super().__init__()

    def parse(self) -> Deltas:
        """Read the source to its end."""
        marker = yield from content(self.source.until(*self._opens))
        while marker:
            blanks, first = yield from gathered(self.source.blanks())
            ended = ""
            if first == "[":
                yield from _asked(self.source.character())
                yield from self._array()
            elif first == "{":
                yield from self._object(marker)
            elif self._named:
                yield from self._named_call()
            else:
                yield Content(marker + blanks)  # the model writes about the marker
                ended = self._closes
            if self._closes and not ended:
                ended = yield from ignored(self.source.until(self._closes, *self._opens))
            if ended in self._opens:
                marker = ended
            else:
                marker = yield from content(self.source.until(*self._opens))

    def _array(self) -> Deltas:
        while (first := (yield from _asked(self.source.space()))) == "{":
            yield from self._object("")
            if (yield from _asked(self.source.space())) == ",":
                yield from _asked(self.source.character())
        if first == "]":
            yield from _asked(self.source.character())

    def _named_call(self) -> Deltas:
        head, marker = yield from gathered(self.source.until("[ARGS]", "[CALL_ID]", "{"))
        if marker == "{":
            self.source.restore(marker)
        call_id = None
        if marker == "[CALL_ID]":
            call_id, _ = yield from gathered(self.source.until("[ARGS]"))
        yield CallStart(head.strip(), call_id and call_id.strip())
        yield from arguments(self.source.json_value())

    def _object(self, marker: str) -> Deltas:
        """Read one object; without a name it is content, with the marker before it."""
        if (yield from _asked(self.source.space())) != "{":
            yield Content(marker)
            return
        yield from _asked(self.source.character())
        read, name, held, begun = marker + "{", None, None, False
        while (yield from _asked(self.source.space())) == '"':
            key, _ = yield from gathered(self.source.json_value())
            yield from _asked(self.source.space())
            yield from _asked(self.source.character())  # the colon
            first = yield from _asked(self.source.space())
            known = _parsed(key) in _ARGUMENTS
            if known and name is not None and first != '"':
                yield CallStart(name)
                begun = True
                yield from arguments(self.source.json_value())
            else:
                value, _ = yield from gathered(self.source.json_value())
                read += f"{key}: {value}"
                held = _unquoted(value) if known else held
                name = name if _parsed(key) != "name" else _text(value)
            if (yield from _asked(self.source.space())) == ",":
                read += (yield from _asked(self.source.character())) + " "
        if (yield from _asked(self.source.space())) == "}":
            read += yield from _asked(self.source.character())
        if not begun and name is None:
            yield Content(read)
        elif not begun:
            yield CallStart(name or "")
            yield CallArguments("{}" if held is None else held)


def _asked(pieces: Pieces[str]) -> Generator[None, None, str]:
    """Return the character that a question to the source gives."""
    _, answer = yield from gathered(pieces)
    return answer


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(text: str) -> str | None:
    value = _parsed(text)
    return value if isinstance(value, str) else None


def _unquoted(text: str) -> str:
    """Return arguments that were written as a text of JSON without its quotes."""
    value = _parsed(text)
    return value if isinstance(value, str) else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Delimiters:
    """Markers of calls whose arguments are JSON between markers.

    Attributes:
        section: Marker before the first call.
        call: Marker before a call.
        head: Marker behind its name.
        call_end: Marker behind the arguments.
        section_end: Marker behind the last call.
        fence: Text behind the head that may come before the arguments, and its end.
    """

    section: str
    call: str
    head: str
    call_end: str
    section_end: str
    fence: tuple[str, str] | None = None


class DelimitedCalls(StreamParser):
    """Calls with a name between two markers and JSON between two others."""

    def __init__(self, marks: Delimiters):
        self._marks = marks
        super().__init__()

    def parse(self) -> Deltas:
        """Read the source to its end."""
        marks = self._marks
        while marker := (yield from content(self.source.until(marks.section, marks.call))):
            while marker and marker != marks.section_end:
                if marker == marks.call:
                    yield from self._call()
                marker = yield from ignored(self.source.until(marks.call, marks.section_end))

    def _call(self) -> Deltas:
        marks = self._marks
        head, _ = yield from gathered(self.source.until(marks.head, marks.call_end))
        ends = [marks.call_end, marks.section_end]
        if marks.fence is not None and head.strip() == "function":
            head, _ = yield from gathered(self.source.until("\n"))
            _, fenced = yield from gathered(self.source.begins(marks.fence[0]))
            ends += [marks.fence[1]] if fenced else []
        yield started(head)
        if (yield from _asked(self.source.space())) == "{":
            yield from arguments(self.source.json_value())  # texts in it may have the markers
        else:
            yield from arguments(trimmed(self.source.until(*ends)))


def started(head: str) -> CallStart:
    """Return the start of the call with this head, which may be `functions.name:0`.

    >>> started(" functions.get_time:1 ")
    CallStart(name='get_time', id='functions.get_time:1')
    """
    head = head.strip()
    if match := re.fullmatch(r"(?:functions\.)?(.+):(\d+)", head):
        return CallStart(match[1], head)
    return CallStart(head.removeprefix("functions."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Markers of calls with an element for each argument.

    Attributes:
        section: Marker before calls.
        section_end: Marker behind them.
        call: Text before a name; "" if it follows the section's marker.
        call_head: Texts that end a name.
        call_end: Marker behind the arguments.
        key: Text before an argument's name.
        key_end: Text behind it.
        value: Marker before its value; "" if the value follows.
        value_end: Marker behind its value.
        lines: Whether a line feed follows the start of a value and comes before its end.
    """

    section: str
    section_end: str
    call: str
    call_head: tuple[str, ...]
    call_end: str
    key: str
    key_end: str
    value: str
    value_end: str
    lines: bool = False


class ElementCalls(StreamParser):
    """Calls with an element for each argument; texts are not quoted, other values are JSON.

    Args:
        marks: Markers.
        schemas: Schemas of the arguments, by tool.
    """

    def __init__(self, marks: Elements, schemas: Mapping[str, Mapping[str, Any]]):
        self._marks, self._schemas = marks, schemas
        super().__init__()

    def parse(self) -> Deltas:
        """Read the source to its end."""
        marks = self._marks
        while (yield from content(self.source.until(marks.section))):
            if not marks.call:
                yield from self._call()
                if marks.call_end != marks.section_end:
                    yield from ignored(self.source.until(marks.section_end))
                continue
            while (yield from ignored(self.source.until(marks.call, marks.section_end))) == (
                marks.call
            ):
                yield from self._call()

    def _call(self) -> Deltas:
        marks, first = self._marks, True
        ends = (*marks.call_head, marks.key, marks.call_end)
        head, marker = yield from gathered(self.source.until(*ends))
        name = head.strip()
        yield CallStart(name)
        yield CallArguments("{")
        if marker in marks.call_head:
            marker = yield from ignored(self.source.until(marks.key, marks.call_end))
        while marker == marks.key:
            key, _ = yield from gathered(self.source.until(marks.key_end))
            if marks.value:
                yield from ignored(self.source.until(marks.value))
            yield CallArguments(("" if first else ", ") + json.dumps(key.strip()) + ": ")
            first = False
            yield from self._value(name, key.strip())
            marker = yield from ignored(self.source.until(marks.key, marks.call_end))
        yield CallArguments("}")

    def _value(self, name: str, key: str) -> Deltas:
        pieces = self.source.until(self._marks.value_end)
        if self._marks.lines:
            pieces = _without_lines(pieces)
        if is_text(argument_schema(self._schemas.get(name), key)):
            yield CallArguments('"')
            yield from _escaped(pieces)
            yield CallArguments('"')
            return
        blanks, first = yield from gathered(self.source.blanks())
        text = ""
        if first and first in '[{"':  # texts in it may have the marker
            text, _ = yield from gathered(self.source.json_value())
        if text and _parsed(text) is None:
            self.source.restore(text)
            text = ""
        rest, _ = yield from gathered(self.source.until(self._marks.value_end))
        whole = blanks + text + rest
        if self._marks.lines:
            whole = whole.removeprefix("\n").removesuffix("\n")
        yield CallArguments(_json_of(whole))


def _without_lines(pieces: Pieces[str]) -> Pieces[str]:
    """Yield pieces without one line feed at the beginning and one at the end."""
    held, begun = "", False
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        if piece is None:
            yield None
            continue
        text = held + (piece if begun else piece.removeprefix("\n"))
        begun = True
        held = "\n" if text.endswith("\n") else ""
        if ready := text.removesuffix(held):
            yield ready


def _escaped(pieces: Pieces[str]) -> Generator[Delta | None, None, None]:
    for piece in pieces:
        yield None if piece is None else CallArguments(json.dumps(piece, ensure_ascii=False)[1:-1])


_PYTHON = {"True": "true", "False": "false", "None": "null"}


def _json_of(text: str) -> str:
    """Return a value as JSON; what is none is a text.

    >>> _json_of(" 5 "), _json_of("True"), _json_of("a b")
    ('5', 'true', '"a b"')
    """
    text = _PYTHON.get(text.strip(), text)
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def _no_constant(name: str) -> None:
    raise ValueError(name)


def argument_schema(schema: Any, key: str) -> Any:
    """Return the schema of one argument; None if it is not known."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def is_text(schema: Any) -> bool:
    """Return whether an argument is always a text.

    >>> is_text({"type": "string"}), is_text({"enum": ["a", "b"]}), is_text({"type": ["string"]})
    (True, True, True)
    >>> is_text({"type": ["string", "null"]}), is_text({})
    (False, False)
    """
    if not isinstance(schema, Mapping):
        return False
    kind, values = schema.get("type"), schema.get("enum")
    if kind is None and "const" in schema:
        return isinstance(schema["const"], str)
    if kind is None and isinstance(values, list) and values:
        return all(isinstance(one, str) for one in values)
    return kind == "string" or kind == ["string"]
