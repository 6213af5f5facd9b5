"""What a model writes besides text: its form of calls and of reasoning, from its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from moefit.engine.detokenize import special_texts
from moefit.server.tools.channels import ReasoningParser
from moefit.server.tools.formats import (
    Format,
    Thinking,
    format_named,
    format_of,
    thinking_named,
    thinking_of,
)
from moefit.server.tools.parsing import (
    CallStart,
    Content,
    Delta,
    PlainParser,
    StreamParser,
)

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """A model's form of calls and reasoning.

    Attributes:
        style: Format of calls; None if none is known.
        thinking: Markers of reasoning; None if it has none, or channels.
        ids: Ids of their markers that are tokens of their own.
        special: Those of them that have no text unless it is asked for.
    """

    style: Format | None = None
    thinking: Thinking | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[int] = frozenset()

    @property
    def channels(self) -> bool:
        """Whether every answer has channels, with or without calls."""
        return self.style is not None and self.style.marks is None

    def visible(self, *, calls: bool) -> frozenset[int]:
        """Return the special tokens whose text a parser reads.

        Args:
            calls: Whether tools may be called.
        """
        if calls or self.channels:
            return self.special
        marks = () if self.thinking is None else self.thinking.markers
        return self.special & {self.ids[one] for one in marks if one in self.ids}

    def thought(self, prompt: str) -> str:
        """Return "begun" if a prompt ends within the reasoning, "ended" if behind it, else ""."""
        end = prompt.rstrip()
        if self.thinking is None:
            return ""
        if end.endswith(self.thinking.opens):
            return "begun"
        return "ended" if end.endswith(self.thinking.closes) else ""

    def parser(
        self, prompt: str, schemas: Mapping[str, Mapping[str, Any]] | None
    ) -> "AnswerParser":
        """Return the parser of an answer.

        Args:
            prompt: The rendered conversation.
            schemas: Schemas of the arguments of tools that may be called; None reads no calls.
        """
        reads = self.style is not None and (schemas is not None or self.channels)
        inner: StreamParser = PlainParser()
        if self.style is not None and reads:
            inner = self.style.make(schemas or {})
        if self.thinking is not None and not self.channels:
            begun = self.thought(prompt) == "begun"
            marks = self.thinking
            inner = ReasoningParser(marks.opens, marks.closes, begun=begun, rest=inner)
        return AnswerParser(inner, calls=reads)


def dialect_of(
    tokenizer: PreTrainedTokenizerBase | None,
    template: str,
    tool_parser: str,
    reasoning_parser: str,
) -> Dialect:
    """Return the dialect of a model.

    Args:
        tokenizer: The model's tokenizer.
        template: Its chat template; empty if it has none.
        tool_parser: "auto", "none" or a format's name.
        reasoning_parser: "auto", "none" or the name of markers.

    Raises:
        ConfigError: For an unknown name.
    """
    style, thinking = format_of(template), thinking_of(template)
    if tool_parser != AUTO:
        style = None if tool_parser == NONE else format_named(tool_parser)
    if reasoning_parser != AUTO:
        thinking = None if reasoning_parser == NONE else thinking_named(reasoning_parser)
    markers = [*(style.markers if style else ()), *(thinking.markers if thinking else ())]
    if tokenizer is None:
        return Dialect(style=style, thinking=thinking)
    ids = _token_ids(tokenizer, markers)
    special = frozenset(special_texts(tokenizer).keys() & ids.values())
    return Dialect(style=style, thinking=thinking, ids=ids, special=special)


def _token_ids(tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> dict[str, int]:
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    return {text: added[text] for text in markers if text in added}


class AnswerParser:
    """Parse an answer; blanks around calls are no content.

    Args:
        parser: Parser of the whole answer.
        calls: Whether it reads calls. Otherwise all blanks are content.
    """

    def __init__(self, parser: StreamParser, *, calls: bool):
        self._parser, self._calls = parser, calls
        self._blanks, self.called = "", False

    def push(self, text: str) -> list[Delta]:
        """Return what becomes known with more text."""
        return self._without_blanks(self._parser.push(text))

    def finish(self) -> list[Delta]:
        """Return the rest, after the last piece."""
        rest = self._without_blanks(self._parser.finish())
        if self._blanks and not self.called:
            rest.append(Content(self._blanks))
        return rest

    def _without_blanks(self, deltas: Sequence[Delta]) -> list[Delta]:
        if not self._calls:
            return list(deltas)
        kept: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, Content):
                text = self._blanks + delta.text
                shown = text.rstrip()
                self._blanks = text[len(shown) :]
                if shown:
                    kept.append(Content(shown))
                continue
            if isinstance(delta, CallStart):
                self.called, self._blanks = True, ""
            kept.append(delta)
        return kept
