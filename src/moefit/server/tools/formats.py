"""The formats of tool calls and of reasoning that models were trained to write.

A format is chosen by what the model's chat template contains, because the template writes earlier
calls in it. The markers are those of the checkpoints' own templates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moefit.errors import ConfigError
from moefit.server.tools.calls import (
    DelimitedCalls,
    Delimiters,
    ElementCalls,
    Elements,
    JsonCalls,
)
from moefit.server.tools.channels import HARMONY, HarmonyParser
from moefit.server.tools.parsing import StreamParser

Schemas = Mapping[str, Mapping[str, Any]]
"""Schemas of arguments, by name of the tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a family of models writes calls.

    Attributes:
        name: As `--tool-parser` takes it.
        sign: Text that is in the chat template.
        make: Returns a parser of one answer.
        marks: What the grammar of calls is made of; None for harmony, which has one of its own.
        markers: Texts that are structure where they are tokens of their own.
    """

    name: str
    sign: str
    make: Callable[[Schemas], StreamParser]
    marks: "Delimiters | Elements | JsonMarks | None"
    markers: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonMarks:
    """Markers around calls that are JSON objects.

    Attributes:
        opens: Marker before a call, or before the array of all.
        closes: Text behind it.
        array: Whether calls are elements of one array.
        lines: Whether a line feed stands between the markers and the call.
        named: Whether a name follows the marker, and `[ARGS]` the name.
    """

    opens: str
    closes: str = ""
    array: bool = False
    lines: bool = False
    named: bool = False


_DEEPSEEK = Delimiters(
    section="<｜tool▁calls▁begin｜>", call="<｜tool▁call▁begin｜>", head="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>", section_end="<｜tool▁calls▁end｜>",
    fence=("```json\n", "\n```"),
)  # fmt: skip
_DEEPSEEK_31 = Delimiters(
    section="<｜tool▁calls▁begin｜>", call="<｜tool▁call▁begin｜>", head="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>", section_end="<｜tool▁calls▁end｜>",
)  # fmt: skip
_KIMI = Delimiters(
    section="<|tool_calls_section_begin|>", call="<|tool_call_begin|>",
    head="<|tool_call_argument_begin|>", call_end="<|tool_call_end|>",
    section_end="<|tool_calls_section_end|>",
)  # fmt: skip
_QWEN_CODER = Elements(
    section="<tool_call>", section_end="</tool_call>", call="<function=", call_head=(">",),
    call_end="</function>", key="<parameter=", key_end=">", value="", value_end="</parameter>",
    lines=True,
)  # fmt: skip
_GLM = Elements(
    section="<tool_call>", section_end="</tool_call>", call="", call_head=("\n",),
    call_end="</tool_call>", key="<arg_key>", key_end="</arg_key>", value="<arg_value>",
    value_end="</arg_value>",
)  # fmt: skip
_MINIMAX = Elements(
    section="<minimax:tool_call>", section_end="</minimax:tool_call>", call='<invoke name="',
    call_head=('">',), call_end="</invoke>", key='<parameter name="', key_end='">', value="",
    value_end="</parameter>",
)  # fmt: skip


def _delimited(name: str, sign: str, marks: Delimiters) -> Format:
    markers = (marks.section, marks.call, marks.head, marks.call_end, marks.section_end)
    return Format(
        name=name,
        sign=sign,
        make=lambda _: DelimitedCalls(marks),
        marks=marks,
        markers=markers,
    )


def _elements(name: str, sign: str, marks: Elements) -> Format:
    markers = (
        marks.section, marks.section_end, marks.key, marks.key_end, marks.value, marks.value_end
    )  # fmt: skip
    return Format(
        name=name,
        sign=sign,
        make=lambda schemas: ElementCalls(marks, schemas),
        marks=marks,
        markers=[one for one in markers if one.startswith(("<", "[")) and one[-1] in ">]"],
    )


def _json(name: str, sign: str, marks: JsonMarks) -> Format:
    return Format(
        name=name,
        sign=sign,
        make=lambda _: JsonCalls((marks.opens,), marks.closes, named=marks.opens == "[TOOL_CALLS]"),
        marks=marks,
        markers=(marks.opens, marks.closes, "[ARGS]", "[CALL_ID]"),
    )


FORMATS = (
    Format(
        name="harmony",
        sign="<|channel|>",
        make=lambda _: HarmonyParser(),
        marks=None,
        markers=HARMONY,
    ),
    _delimited("deepseek_v3", "```json", _DEEPSEEK),
    _delimited("deepseek_v31", "<｜tool▁calls▁begin｜>", _DEEPSEEK_31),
    _delimited("kimi_k2", "<|tool_calls_section_begin|>", _KIMI),
    _elements("minimax_m2", "<minimax:tool_call>", _MINIMAX),
    _elements("glm45", "<arg_key>", _GLM),
    _elements("qwen3_coder", "<function=", _QWEN_CODER),
    _json("mistral", "[ARGS]", JsonMarks(opens="[TOOL_CALLS]", named=True)),
    _json("mistral_json", "[TOOL_CALLS]", JsonMarks(opens="[TOOL_CALLS]", array=True)),
    _json("granite", "<|tool_call|>", JsonMarks(opens="<|tool_call|>", array=True)),
    _json(
        "hermes",
        "<tool_call>",
        JsonMarks(opens="<tool_call>", closes="</tool_call>", lines=True),
    ),
)
"""All formats; of those whose sign is in a template the first one is used."""


def format_of(template: str) -> Format | None:
    """Return the format whose sign is in a chat template; None if none is known."""
    for one in FORMATS:
        if one.sign in template and (one.marks is not _DEEPSEEK or _DEEPSEEK.section in template):
            return one
    return None


def format_named(name: str) -> Format:
    """Return a format by its name. Raises ConfigError for an unknown one."""
    for one in FORMATS:
        if one.name == name:
            return one
    names = ", ".join(sorted(one.name for one in FORMATS))
    raise ConfigError(f"--tool-parser {name} is not known; use auto, none, {names}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Markers around reasoning. `name` is as `--reasoning-parser` takes it."""

    name: str
    opens: str
    closes: str

    @property
    def markers(self) -> tuple[str, str]:
        """Both markers."""
        return self.opens, self.closes


THINKING = (
    Thinking(name="think", opens="<think>", closes="</think>"),
    Thinking(name="mistral", opens="[THINK]", closes="[/THINK]"),
    Thinking(name="seed", opens="<seed:think>", closes="</seed:think>"),
)


def thinking_of(template: str) -> Thinking | None:
    """Return the markers of reasoning that a chat template contains; None if it has none."""
    return next((one for one in THINKING if one.opens in template or one.closes in template), None)


def thinking_named(name: str) -> Thinking:
    """Return markers of reasoning by their name. Raises ConfigError for an unknown one."""
    for one in THINKING:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in THINKING)
    raise ConfigError(f"--reasoning-parser {name} is not known; use auto, none, {names}")
