"""The process that renders a model's chat template, which comes with the checkpoint.

Run by its path in a bare interpreter (see `templates`), so it imports nothing but the standard
library and Jinja. Owns what a template sees, which is what transformers' `apply_chat_template`
shows it, and which form of `content` it reads. Frames on stdin and stdout are JSON behind eight
bytes of length.
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
_READ = ("user", "system")  # roles whose text no prompt may lack; templates may shorten answers
_SURE = 24  # characters that a prompt does not have by chance
# Roles whose content is given as a list of parts; those of the first form that works are kept.
FORMS = (
    frozenset(),
    frozenset({"system", "user", "assistant"}),
    frozenset({"user"}),
    frozenset({"user", "assistant"}),
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the assistant says; here its body is all that counts."""

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
    """`namespace(...)` that keeps no name with an underscore before it."""

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
    """Return what transformers compiles chat templates in."""
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
    """One model's template."""

    def __init__(self, source: str):
        self._template = environment().from_string(source)
        self._form: frozenset[str] = FORMS[0]

    def render(self, messages: Sequence[Message], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"text": ...}, or why there is none: {"refused": ...}, {"lost": index}."""
        failures: dict[frozenset[str], dict[str, Any]] = {}
        refusal: dict[str, Any] | None = None
        for form in sorted(FORMS, key=lambda one: one != self._form):
            try:
                text = self._once(messages, form, values)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the template's code does
                if type(error) is jinja2.TemplateError:  # what the template itself says
                    refusal = refusal or {"refused": _told(error)}
                failures[form] = {"refused": _told(error)}
                continue
            missing = self._missing(text, messages, form, values)
            if missing is None:
                self._form = form
                return {"text": text}
            failures[form] = {"lost": missing}
        return refusal or failures[FORMS[0]]

    def _once(
        self, messages: Sequence[Message], form: frozenset[str], values: Mapping[str, Any]
    ) -> str:
        shaped = [_shaped(message, form) for message in messages]
        return self._template.render(
            **{**values, "messages": shaped, "tools": None, "documents": None}
        )

    def _missing(
        self,
        text: str,
        messages: Sequence[Message],
        form: frozenset[str],
        values: Mapping[str, Any],
    ) -> int | None:
        """Return which message's text a prompt lacks, if it lacks one's.

        What can't be told by looking is tried with numbers in the place of texts.
        """
        if mangled(text, messages):
            return next(n for n, one in enumerate(messages) if one["role"] in form)
        doubtful = doubts(text, messages)
        if not doubtful:
            return None
        marks = {index: str(7_304_911_000_000_000 + 7919 * index) for index in doubtful}
        tried = [
            {**one, "content": marks[index]} if index in marks else one
            for index, one in enumerate(messages)
        ]
        try:
            marked = self._once(tried, form, values)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - it wants a text of some shape, and has read it
            return None
        return next((index for index, mark in marks.items() if mark not in marked), None)


def texts(message: Message) -> list[str]:
    """Return the texts of a message's parts."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _shaped(message: Message, form: frozenset[str]) -> Message:
    """Return the message as `apply_chat_template` gives it to a template, in that form."""
    parts = texts(message)
    content: Any = "".join(parts)
    if message["role"] in form:
        content = [{"type": "text", "text": part} for part in parts]
    shaped = {**message, "content": content}
    shaped = {name: value for name, value in shaped.items() if value is not None}
    reasoning = next((shaped[name] for name in _REASONING if name in shaped), None)
    if reasoning is None:
        return shaped
    return {"thinking": reasoning, **shaped, "reasoning_content": reasoning}


def mangled(text: str, messages: Sequence[Message]) -> bool:
    """Return whether a list of parts was written out as a list."""
    for sign in ("'type': 'text'", '"type": "text"'):
        said = sum(part.count(sign) for message in messages for part in texts(message))
        if text.count(sign) > said:
            return True
    return False


def doubts(text: str, messages: Sequence[Message]) -> list[int]:
    """Return which messages' texts are not surely in the prompt: not found, or very short."""
    found, at = [], 0
    for index, message in enumerate(messages):
        for part in texts(message) if message["role"] in _READ else ():
            said = part.strip()
            place = text.find(said, at)
            if place >= 0 and (len(said) >= _SURE or not said):
                at = place + len(said)
            else:
                found.append(index)
                break
    return found


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:1000]


def read_frame(stream: BinaryIO) -> Any:
    """Return the next frame, or None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return parsed(stream.read(int.from_bytes(head)))


def parsed(body: bytes) -> Any:
    """Return what a frame's body says."""
    return json.loads(body.decode("utf-8", "surrogatepass"))


def frame(value: Any) -> bytes:
    """Return a value as a frame."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8) + body


def _bound(memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def answers(asked: Iterator[Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Answer a template's source with {}, and each conversation after it.

    A rendering that takes longer than `seconds` ends the process by SIGALRM, whatever it is doing.
    """
    template: ChatTemplate | None = None
    for one in asked:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            if template is None:
                template = ChatTemplate(one["template"])
                answer: dict[str, Any] = {}
            else:
                answer = template.render(one["messages"], one["values"])
                if len(answer.get("text", "")) > one["longest"]:
                    answer = {"long": len(answer["text"])}
        except MemoryError:
            answer = {"memory": True}
        except Exception as error:  # noqa: BLE001 - a template that can't be compiled
            answer = {"refused": _told(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        yield answer


def main(memory: int, seconds: float) -> None:
    """Serve one template until stdin ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _bound(memory)
    given = iter(lambda: read_frame(sys.stdin.buffer), None)
    for answer in answers(given, seconds):
        sys.stdout.buffer.write(frame(answer))
        sys.stdout.buffer.flush()
        if "memory" in answer:
            return  # what is left of it may be in any state


if __name__ == "__main__":
    main(int(sys.argv[3]), float(sys.argv[4]))
