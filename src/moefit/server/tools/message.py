"""Write the message of one choice from the engine's texts, in OpenAI's format."""

from collections.abc import Callable
from uuid import uuid4

from moefit.engine.api import FinishReason
from moefit.server.openai_schema import ChatFunction, ChatMessage, ChatToolCall, Finish
from moefit.server.openai_schema import Delta as ChatDelta
from moefit.server.tools.dialect import AnswerParser
from moefit.server.tools.parsing import CallArguments, CallStart, Content, Delta, Reasoning

_SHORT = 9  # letters and digits, as the templates of Mistral's models demand


def new_call_id() -> str:
    """Return a unique id for a call, which every model's template accepts.

    >>> len(new_call_id())
    9
    """
    return uuid4().hex[:_SHORT]


class MessageWriter:
    """Convert the text of one choice to deltas of its message, and to the whole message.

    Args:
        parser: Parser of the answer.
        make_id: Returns ids for calls that have none of their own.
    """

    def __init__(self, parser: AnswerParser, make_id: Callable[[], str] = new_call_id):
        self._parser, self._make_id = parser, make_id
        self._texts: dict[type[Delta], list[str]] = {Content: [], Reasoning: []}
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments

    def push(self, text: str) -> list[ChatDelta]:
        """Return the deltas that become known with more text."""
        return self._added(self._parser.push(text) if text else [])

    def finish(self, text: str) -> list[ChatDelta]:
        """Return the remaining deltas, after the last piece of text."""
        return self._added([*(self._parser.push(text) if text else []), *self._parser.finish()])

    def reason(self, reason: FinishReason) -> Finish:
        """Return the finish reason of the choice."""
        assert reason in ("stop", "length"), "other finish reasons raise errors"
        return "tool_calls" if self._calls and reason == "stop" else reason

    def message(self) -> ChatMessage:
        """Return the whole message, after `finish`."""
        content, thoughts = ("".join(self._texts[kind]) for kind in (Content, Reasoning))
        calls = [
            ChatToolCall(
                id=call_id,
                type="function",
                function=ChatFunction(name=name, arguments="".join(arguments)),
            )
            for call_id, name, arguments in self._calls
        ]
        return ChatMessage(
            content=content or (None if calls else ""),
            reasoning_content=thoughts or None,
            tool_calls=calls or None,
        )

    def _added(self, deltas: list[Delta]) -> list[ChatDelta]:
        return [self._add(delta) for delta in deltas]

    def _add(self, delta: Delta) -> ChatDelta:
        """Record a delta and return it in OpenAI's format."""
        if isinstance(delta, CallStart):
            call_id = delta.id or self._make_id()
            self._calls.append((call_id, delta.name, []))
            function = ChatFunction(name=delta.name, arguments="")
            return self._call(ChatToolCall(id=call_id, type="function", function=function))
        if isinstance(delta, CallArguments):
            self._calls[-1][2].append(delta.text)
            return self._call(ChatToolCall(function=ChatFunction(arguments=delta.text)))
        self._texts[type(delta)].append(delta.text)
        if isinstance(delta, Reasoning):
            return ChatDelta(reasoning_content=delta.text)
        return ChatDelta(content=delta.text)

    def _call(self, call: ChatToolCall) -> ChatDelta:
        number = len(self._calls) - 1
        return ChatDelta(tool_calls=[call.model_copy(update={"index": number})])
