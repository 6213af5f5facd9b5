"""Grammars of calls: what an answer may be where a call is required or arguments are strict.

Each format's calls are written as rules, with a part for the JSON of arguments. Markers that are
tokens of their own are named by id, since no text matches them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moefit.engine.structured.sources import ANY_OBJECT, json_part, literal
from moefit.errors import ConfigError
from moefit.server.errors import APIError, naming
from moefit.server.structured.request import Form
from moefit.server.tools.calls import Delimiters, Elements, argument_schema, is_text
from moefit.server.tools.channels import CHANNEL, CONSTRAIN, END, MESSAGE, START
from moefit.server.tools.formats import Format, JsonMarks, Thinking

_TERMINALS = "TEXT: /(?s:.*)/\nGAP: /[ \\n]{0,4}/"
_UNENFORCED = ("pattern", "format", "minLength", "maxLength")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """A tool as a grammar sees it.

    Attributes:
        name: Its name.
        schema: Schema of its arguments.
        strict: Whether the arguments must match it.
        field: The request's field with the schema.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    field: str


@dataclass(slots=True)
class Rules:
    """Rules of a grammar that is being written, and its parts.

    Attributes:
        ids: Ids of markers that are tokens of their own.
        lines: Rules so far.
        forms: Parts that they refer to.
    """

    ids: Mapping[str, int]
    lines: list[str] = field(default_factory=list)
    forms: dict[str, Form] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        """Return a marker, or any other fixed text, as it is written in a rule."""
        if not text:
            return ""
        return f"<[{self.ids[text]}]>" if text in self.ids else literal(text)

    def up_to(self, marker: str) -> str:
        """Return the name of a rule for any text up to a marker, and the marker."""
        name = f"up_to_{len(self.lines)}"
        if marker in self.ids:
            self.lines.append(f"{name}: TEXT {self.mark(marker)} | {name}_text")
            name, shown = f"{name}_text", name
        else:
            shown = name
        self.lines.append(f"{name}[lazy]: TEXT {literal(marker)}")
        return shown

    def part(self, form: Form) -> str:
        """Return a reference to a new part."""
        name = f"part_{len(self.forms)}"
        self.forms[name] = form
        return f"@{name}"

    def arguments(self, tool: ToolForm) -> str:
        """Return a reference to the part for a tool's arguments as JSON."""
        with naming(tool.field):
            schema = tool.schema if tool.strict else ANY_OBJECT
            return self.part(Form(field=tool.field, part=json_part(schema, "the schema")))

    def text(self, start: str) -> str:
        """Return the grammar."""
        return "\n".join([f"start: {start}", *self.lines, _TERMINALS])


def call_rules(rules: Rules, marks: Any, tools: Sequence[ToolForm], *, many: bool) -> str:
    """Return what follows the marker before calls, as it is written in a rule.

    Args:
        rules: Receives rules and parts.
        marks: Of the format.
        tools: Tools that may be called.
        many: Whether several calls may follow each other.
    """
    if isinstance(marks, JsonMarks):
        return _json_calls(rules, marks, tools, many=many)
    if isinstance(marks, Delimiters):
        return _delimited_calls(rules, marks, tools, many=many)
    return _element_calls(rules, marks, tools, many=many)


def opening(marks: Any) -> str:
    """Return the marker before calls."""
    return marks.opens if isinstance(marks, JsonMarks) else marks.section


def repeats(marks: Any) -> bool:
    """Return whether each call has the marker before it."""
    if isinstance(marks, JsonMarks):
        return not marks.array
    return isinstance(marks, Elements) and marks.section == "<tool_call>"


def _any_of(options: Sequence[str]) -> str:
    return f"({' | '.join(options)})"


def _json_calls(rules: Rules, marks: JsonMarks, tools: Sequence[ToolForm], *, many: bool) -> str:
    if marks.named:
        return _any_of(
            [f"{literal(one.name)} {rules.mark('[ARGS]')} {rules.arguments(one)}" for one in tools]
        )
    heads = [f'{{"name": {json.dumps(one.name)}, "arguments": ' for one in tools]
    call = _any_of(
        [
            f'{literal(head)} {rules.arguments(one)} "}}"'
            for head, one in zip(heads, tools, strict=True)
        ]
    )
    if marks.array:
        more = f'(", " {call})*' if many else ""
        return f'"[" {call} {more} "]"'
    return f'"\\n" {call} "\\n" {rules.mark(marks.closes)}'


def _delimited_calls(
    rules: Rules, marks: Delimiters, tools: Sequence[ToolForm], *, many: bool
) -> str:
    calls = []
    for one in tools:
        if marks.fence is not None:
            name = literal(f"{one.name}\n{marks.fence[0]}")
            head = f'"function" {rules.mark(marks.head)} {name}'
            tail = literal(marks.fence[1])
        elif marks.call == "<|tool_call_begin|>":
            name = literal(f"functions.{one.name}:")
            head = f"{name} /[0-9]{{1,3}}/ {rules.mark(marks.head)}"
            tail = ""
        else:
            head, tail = f"{literal(one.name)} {rules.mark(marks.head)}", ""
        calls.append(f"{head} {rules.arguments(one)} {tail}")
    call = f"{rules.mark(marks.call)} {_any_of(calls)} {rules.mark(marks.call_end)}"
    more = f"(GAP {call})*" if many else ""
    return f"{call} {more} {rules.mark(marks.section_end)}"


def _element_calls(rules: Rules, marks: Elements, tools: Sequence[ToolForm], *, many: bool) -> str:
    calls = []
    for one in tools:
        head = literal(f"{marks.call}{one.name}{marks.call_head[0]}")
        breaks = "\n" if marks.lines or marks.section.startswith("<minimax") else ""
        inner = _elements(rules, marks, one) if one.strict else rules.up_to(marks.call_end)
        end = rules.mark(marks.call_end) if one.strict else ""
        calls.append(f"{head} {rules.mark(breaks)} {inner} {end}")
    call = _any_of(calls)
    if not marks.call:
        return call
    more = f'("\\n" {call})*' if many and not repeats(marks) else ""
    return f'"\\n" {call} {more} "\\n" {rules.mark(marks.section_end)}'


def _elements(rules: Rules, marks: Elements, tool: ToolForm) -> str:
    """Return a tool's arguments, in the schema's order."""
    properties = tool.schema.get("properties") or {}
    required = tool.schema.get("required") or []
    if not isinstance(properties, Mapping):
        _invalid(f"{tool.field}.properties", "an object with a schema for each argument")
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        _invalid(f"{tool.field}.required", "a list of arguments' names")
    for name in ("anyOf", "oneOf", "allOf", "$ref", "if", "not", "patternProperties"):
        if name in tool.schema:
            _refuse(tool.field, f"{name} at the top of the schema")
    if unknown := [name for name in required if name not in properties]:
        _refuse(tool.field, f"the required argument {unknown[0]!r} without a schema")
    parts = []
    for key in properties:
        marked = any(one in key for one in (marks.key_end, marks.value_end, "\n"))
        if marked or not key or key != key.strip():
            _refuse(tool.field, f"an argument named {key!r}")
        space = "\n" if marks.lines else ""
        head = f"{rules.mark(marks.key)} {literal(key)} {rules.mark(marks.key_end)}"
        if marks.value:
            head += f' "\\n" {rules.mark(marks.value)}'
        part = f'{head} {rules.mark(space)} {_value(rules, marks, tool, key)} "\\n"'
        parts.append(part if key in required else f"({part})?")
    return " ".join(parts)


def _value(rules: Rules, marks: Elements, tool: ToolForm, key: str) -> str:
    """Return one argument's value with the marker behind it."""
    schema = argument_schema(tool.schema, key)
    path = f"{tool.field}.properties.{key}"
    end = ("\n" if marks.lines else "") + marks.value_end
    if is_text(schema):
        if unenforced := [name for name in _UNENFORCED if name in schema]:
            _refuse(path, unenforced[0])
        texts = [schema["const"]] if "const" in schema else schema.get("enum")
        if texts is None:
            return rules.up_to(end)
        if not isinstance(texts, list) or not texts:
            _invalid(f"{path}.enum", "a list with at least one value")
        if not all(isinstance(one, str) and marks.value_end not in one for one in texts):
            _refuse(path, "an enum with such values")
        value = _any_of([literal(one) for one in texts])
    else:
        inner = dict(schema) if isinstance(schema, Mapping) else {}
        definitions = {name: tool.schema[name] for name in ("$defs", "definitions")
                       if name in tool.schema}  # fmt: skip
        with naming(path):
            value = rules.part(Form(field=path, part=json_part({**definitions, **inner}, "it")))
    return f"{value} {rules.mark(end) if end in rules.ids else _split_end(rules, end)}"


def _split_end(rules: Rules, end: str) -> str:
    marker = end.removeprefix("\n")
    return f"{rules.mark(end[: len(end) - len(marker)])} {rules.mark(marker)}"


def _invalid(field: str, what: str) -> NoReturn:
    raise APIError(400, f"{field} must be {what}", param=field, code="invalid_value")


def _refuse(field: str, what: str) -> NoReturn:
    raise APIError(
        400,
        f"{field}: {what} cannot be guaranteed in this model's form of calls, which writes texts "
        "without quotes; leave it out, or use tool_choice auto without strict",
        param=field,
        code="unsupported_schema",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an answer may be.

    Attributes:
        tools: Tools that may be called.
        required: Whether one must be.
        many: Whether several may be.
        form: Form of an answer without calls; None for any text.
    """

    tools: Sequence[ToolForm] = ()
    required: bool = False
    many: bool = True
    form: Form | None = None

    @property
    def restricts(self) -> bool:
        """Whether a grammar is needed."""
        strict = any(one.strict for one in self.tools)
        single = bool(self.tools) and not self.many
        return self.required or strict or single or self.form is not None


def write_grammar(
    wanted: Wanted,
    style: Format | None,
    thinking: Thinking | None,
    ids: Mapping[str, int],
    *,
    thought: str,
) -> tuple[str, Mapping[str, Form]]:
    """Return rules and parts of the grammar of an answer.

    Args:
        wanted: What it may be.
        style: Format of calls; needed for tools.
        thinking: Markers of reasoning, which may come first.
        ids: Ids of markers that are tokens of their own.
        thought: "begun" if the prompt ended within the reasoning, "ended" if behind it, else "".
    """
    rules = Rules(ids=ids)
    if style is not None and style.marks is None:
        return rules.text(_harmony(rules, wanted)), rules.forms
    before = _before(rules, thinking, thought)
    answer = "TEXT" if wanted.form is None else rules.part(wanted.form)
    if not wanted.tools:
        return rules.text(f"{before} {answer}"), rules.forms
    if style is None:
        raise ConfigError("this model's chat template has no known form of calls")
    marks = style.marks
    body = call_rules(rules, marks, wanted.tools, many=wanted.many)
    section = f"{rules.mark(opening(marks))} {body}"
    more = f"(GAP {section})*" if wanted.many and repeats(marks) else ""
    if wanted.required:
        return rules.text(f"{before} {section} {more}"), rules.forms
    if wanted.form is not None:
        return rules.text(f"{before} ({answer} | {section} {more})"), rules.forms
    lead = f"{rules.up_to(opening(marks))} {body}"
    if wanted.many and repeats(marks):
        return rules.text(f"{before} ({lead})* TEXT"), rules.forms
    return rules.text(f"{before} (TEXT | {lead})"), rules.forms


def _before(rules: Rules, thinking: Thinking | None, thought: str) -> str:
    if thinking is None or thought == "ended":
        return ""
    inside = f"{rules.up_to(thinking.closes)} GAP"
    return inside if thought == "begun" else f"({rules.mark(thinking.opens)} {inside})?"


def _harmony(rules: Rules, wanted: Wanted) -> str:
    """Return the start rule for gpt-oss: analysis, then calls or the final channel."""

    def channel(name: str) -> str:
        return f"{rules.mark(CHANNEL)} {literal(name)} {rules.mark(MESSAGE)}"

    again = f'{rules.mark(START)} "assistant"'
    kinds = ["analysis"] if wanted.required else ["analysis", "commentary"]
    before = " | ".join(f"{channel(one)} {rules.up_to(END)} {again}" for one in kinds)
    calls = [
        f"{rules.mark(CHANNEL)} {literal('commentary to=functions.' + one.name + ' ')} "
        f'{rules.mark(CONSTRAIN)} "json" {rules.mark(MESSAGE)} {rules.arguments(one)}'
        for one in wanted.tools
    ]
    answer = "TEXT" if wanted.form is None else rules.part(wanted.form)
    last = calls if wanted.required else [*calls, f"{channel('final')} {answer}"]
    return f"({before})* {_any_of(last)}"
