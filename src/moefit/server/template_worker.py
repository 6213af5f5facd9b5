"""Process that renders a model's chat template, which comes with the checkpoint.

Runs by path in an isolated interpreter (see `tokenizer.py`), so it imports only the standard
library and Jinja. Provides the environment of transformers' `apply_chat_template` and finds the
form of `content` that the template expects. Frames on stdin and stdout are JSON after an eight-byte
length.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

Message = dict[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
_REQUIRED_ROLES = ("user", "system", "tool")
"""Roles whose text must be in the prompt; templates may shorten others."""
_MIN_UNIQUE = 24  # length at which a text cannot occur by chance
# Roles whose content is passed as a list of parts. The first form that works for a conversation is
# used, whatever others needed: one client's texts must not change another's prompt.
FORMS = (
    frozenset(),
    frozenset({"system", "user", "assistant"}),
    frozenset({"user"}),
    frozenset({"user", "assistant"}),
)
# Forms of messages with calls: whether arguments are objects, and the content if there is none.
CALL_FORMS: tuple[tuple[bool, str | None], ...] = (
    (True, None), (False, None), (True, ""), (False, "")
)  # fmt: skip
Form = tuple[frozenset[str], tuple[bool, str | None]]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text; only its body is rendered here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], args[1:]  # so that a name may be `self`
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} begins with an underscore; rename it")


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> jinja2.Environment:
    """Return the Jinja environment in which transformers compiles chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str):
        self._template = environment().from_string(source)

    def render(
        self,
        messages: Sequence[Message],
        values: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return {"text": ...}, or why it failed: "refused", "lost" (an index) or "tools"."""
        values = {**values, "tools": tools}
        failures: dict[Form, dict[str, Any]] = {}
        refusal: dict[str, Any] | None = None
        calls = CALL_FORMS if any("tool_calls" in one for one in messages) else CALL_FORMS[:1]
        forms = [(roles, call) for call in calls for roles in FORMS]
        for form in forms:
            try:
                text = self._render_form(messages, form, values)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - any error in the template
                if type(error) is jinja2.TemplateError:  # raised by the template itself
                    refusal = refusal or {"refused": _error_text(error)}
                failures[form] = {"refused": _error_text(error)}
                continue
            missing = self._missing(text, messages, form, values)
            if missing is not None:
                failures[form] = {"lost": missing}
            elif any(one["function"]["name"] not in text for one in tools or ()):
                failures[form] = {"tools": False}
            else:
                return {"text": text}
        return refusal or failures[forms[0]]

    def _render_form(
        self, messages: Sequence[Message], form: Form, values: Mapping[str, Any]
    ) -> str:
        shaped = [_in_form(message, form) for message in messages]
        return self._template.render(**{**values, "messages": shaped, "documents": None})

    def _missing(
        self,
        text: str,
        messages: Sequence[Message],
        form: Form,
        values: Mapping[str, Any],
    ) -> int | None:
        """Return the index of a message whose text is missing from the prompt, or None.

        Texts that a search cannot confirm are replaced by numbers and rendered again.
        """
        given = given_texts(messages, values.get("tools"))
        listed = [index for index, one in enumerate(messages) if one["role"] in form[0]]
        if listed and is_mangled(text, given):
            return listed[0]
        for index, message in enumerate(messages):
            calls = message.get("tool_calls", ())
            if any(not _shows_call(text, one, form[1][0], given) for one in calls):
                return index
        uncertain = uncertain_messages(text, messages)
        if not uncertain:
            return None
        marks = {index: str(7_304_911_000_000_000 + 7919 * index) for index in uncertain}
        tried = [
            {**one, "content": marks[index]} if index in marks else one
            for index, one in enumerate(messages)
        ]
        try:
            marked = self._render_form(tried, form, values)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - the template parses the text, so it has read it
            return None
        return next((index for index, mark in marks.items() if mark not in marked), None)


def texts(message: Message) -> list[str]:
    """Return the texts of a message's parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def given_texts(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[str]:
    """Return what a prompt may say whatever its form: texts, reasoning, arguments and tools."""
    found = [one for message in messages for one in texts(message)]
    found += [one[name] for one in messages for name in _REASONING if one.get(name)]
    shown: list[Any] = list(tools or ())
    for message in messages:
        for call in message.get("tool_calls", ()):
            found.append(call["function"]["arguments"])
            shown.append(_arguments(call))
    return found + [json.dumps(one, ensure_ascii=False) for one in shown]


def _times(sign: str, text: str, given: Sequence[str]) -> int:
    """Return how often a prompt says something more than the texts in it do."""
    return text.count(sign) - sum(one.count(sign) for one in given if sign in one)


def _shows_call(text: str, call: Mapping[str, Any], objects: bool, given: Sequence[str]) -> bool:
    """Return whether a prompt has a call, with arguments as JSON and not as Python prints them."""
    if call["function"]["name"] not in text:
        return False
    if not objects:
        return True
    value = _arguments(call)
    if isinstance(value, str):
        return True
    return str(value) == _tojson(value) or _times(str(value), text, given) <= 0


def _in_form(message: Message, form: Form) -> Message:
    """Return a message as `apply_chat_template` passes it to a template, in one of the forms."""
    parts, (roles, (objects, empty)) = texts(message), form
    content: Any = "".join(parts)
    if message["role"] in roles:
        content = [{"type": "text", "text": part} for part in parts]
    shaped = {**message, "content": content}
    shaped = {name: value for name, value in shaped.items() if value is not None}
    if "tool_calls" in shaped:
        shaped["tool_calls"] = [_call_in_form(one, objects) for one in shaped["tool_calls"]]
        shaped["content"] = content if any(parts) else empty
    reasoning = next((shaped[name] for name in _REASONING if name in shaped), None)
    if reasoning is None:
        return shaped
    return {"thinking": reasoning, **shaped, "reasoning_content": reasoning}


def _call_in_form(call: Mapping[str, Any], objects: bool) -> dict[str, Any]:
    given = call["function"]["arguments"]
    function = {**call["function"], "arguments": _arguments(call) if objects else given}
    return {**call, "function": function}


def _arguments(call: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return a call's arguments as an object; as text if an answer was cut or is no JSON."""
    given = call["function"]["arguments"]
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


def is_mangled(text: str, given: Sequence[str]) -> bool:
    """Return whether the template printed a list of parts as a list."""
    return any(_times(sign, text, given) > 0 for sign in ("'type': 'text'", '"type": "text"'))


def uncertain_messages(text: str, messages: Sequence[Message]) -> list[int]:
    """Return the indices of messages whose text was not found in the prompt or is very short."""
    found, at = [], 0
    for index, message in enumerate(messages):
        for part in texts(message) if message["role"] in _REQUIRED_ROLES else ():
            expected = part.strip()
            place = text.find(expected, at)
            if place >= 0 and (len(expected) >= _MIN_UNIQUE or not expected):
                at = place + len(expected)
            else:
                found.append(index)
                break
    return found


def _error_text(error: Exception) -> str:
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:1000]


def read_frame(stream: BinaryIO) -> Any:
    """Return the next frame, or None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return parse_frame(stream.read(int.from_bytes(head)))


def parse_frame(body: bytes) -> Any:
    """Return the value of a frame's body."""
    return json.loads(body.decode("utf-8", "surrogatepass"))


def frame(value: Any) -> bytes:
    """Return a value encoded as a frame."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8) + body


def _limit_resources(memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def responses(requests: Iterator[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield {} for a template's source, then the result for each conversation.

    A rendering that takes longer than `seconds` ends the process by SIGALRM.
    """
    template: ChatTemplate | None = None
    for one in requests:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            if template is None:
                template = ChatTemplate(one["template"])
                answer: dict[str, Any] = {}
            else:
                answer = template.render(one["messages"], one["values"], one.get("tools"))
                if len(answer.get("text", "")) > one["longest"]:
                    answer = {"long": len(answer["text"])}
        except MemoryError:
            answer = {"memory": True}
        except Exception as error:  # noqa: BLE001 - a template that does not compile
            answer = {"refused": _error_text(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        yield answer


def main(memory: int, seconds: float) -> None:
    """Render one template until stdin ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_resources(memory)
    given = iter(lambda: read_frame(sys.stdin.buffer), None)
    for answer in responses(given, seconds):
        sys.stdout.buffer.write(frame(answer))
        sys.stdout.buffer.flush()
        if "memory" in answer:
            return  # the process may be in any state


if __name__ == "__main__":
    main(int(sys.argv[3]), float(sys.argv[4]))
