"""Parsers of answers: written examples of every format, divided into pieces in every way."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefit.errors import ConfigError
from moefit.server.tools.channels import ReasoningParser
from moefit.server.tools.formats import (
    FORMATS,
    THINKING,
    format_named,
    format_of,
    thinking_named,
    thinking_of,
)
from moefit.server.tools.parsing import (
    CallArguments,
    CallStart,
    Content,
    PlainParser,
    Reasoning,
    StreamParser,
)

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "detail": {"type": ["string", "null"]},
        },
    },
    "run": {"properties": {"code": {"type": "string"}, "opts": {"type": "object"}}},
}
PARIS, ROME = {"city": 'Pa"ris é', "days": 2}, {"city": "Rome", "detail": None}
CODE = {"code": "if a < b:\n\tprint('</x>')\n", "opts": {"x": [1, {"y": "]}"}]}}


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def hermes(*calls: tuple[str, Any]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {dumped(given)}}}\n</tool_call>'
        for name, given in calls
    )


def deepseek(*calls: tuple[str, Any], fence: bool) -> str:
    inner = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumped(given)}\n```"
        "<｜tool▁call▁end｜>"
        if fence
        else f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumped(given)}<｜tool▁call▁end｜>"
        for name, given in calls
    )
    return "<｜tool▁calls▁begin｜>" + "\n".join(inner) + "<｜tool▁calls▁end｜>"


def kimi(*calls: tuple[str, Any]) -> str:
    inner = (
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{dumped(given)}"
        "<|tool_call_end|>"
        for number, (name, given) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{''.join(inner)}<|tool_calls_section_end|>"


def written(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def qwen_coder(*calls: tuple[str, Any]) -> str:
    def one(name: str, given: Any) -> str:
        inner = "".join(
            f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in given.items()
        )
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def glm(*calls: tuple[str, Any]) -> str:
    def one(name: str, given: Any) -> str:
        inner = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{written(value)}</arg_value>\n"
            for key, value in given.items()
        )
        return f"<tool_call>{name}\n{inner}</tool_call>"

    return "\n".join(one(*call) for call in calls)


def minimax(*calls: tuple[str, Any]) -> str:
    def one(name: str, given: Any) -> str:
        inner = "".join(
            f'<parameter name="{key}">{written(value)}</parameter>\n'
            for key, value in given.items()
        )
        return f'<invoke name="{name}">\n{inner}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(one(*call) for call in calls)}</minimax:tool_call>"


def array(opens: str, *calls: tuple[str, Any]) -> str:
    return opens + dumped([{"name": name, "arguments": given} for name, given in calls])


def mistral(*calls: tuple[str, Any]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumped(given)}" for name, given in calls)


def harmony(*calls: tuple[str, Any]) -> str:
    (name, given), *_ = calls
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumped(given)}"


TWO = (("weather", PARIS), ("run", CODE))
TWICE = (("weather", PARIS), ("weather", ROME))
EXAMPLES = {
    "hermes": [hermes(*TWO), "Let me see.\n" + hermes(*TWICE) + "\n", hermes(("run", {}))],
    "deepseek_v3": [deepseek(*TWO, fence=True), deepseek(*TWO, fence=False)],
    "deepseek_v31": ["Hm." + deepseek(*TWICE, fence=False), deepseek(*TWO, fence=False)],
    "kimi_k2": [kimi(*TWO), "So:" + kimi(*TWICE)],
    "qwen3_coder": [qwen_coder(*TWO), "I look.\n\n" + qwen_coder(*TWICE)],
    "glm45": [glm(*TWO), "I look.\n" + glm(*TWICE), glm(("run", {}))],
    "minimax_m2": [minimax(*TWO), "I look.\n" + minimax(*TWICE), minimax(("run", {}))],
    "mistral": [mistral(*TWO), "ok" + mistral(*TWICE), array("[TOOL_CALLS]", *TWO)],
    "mistral_json": [array("[TOOL_CALLS] ", *TWO), array("[TOOL_CALLS]", *TWICE)],
    "granite": [array("<|tool_call|>", *TWO), "x" + array("<|tool_call|>", *TWICE)],
    "harmony": [
        harmony(*TWO),
        "<|channel|>analysis<|message|>I must\nlook.<|end|><|start|>assistant" + harmony(*TWICE),
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.weather"
        f"<|channel|>commentary json<|message|>{dumped(PARIS)}<|call|>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes!",
    ],
}
ALL = [(name, text) for name, texts in EXAMPLES.items() for text in texts]


def fed(parser: StreamParser, pieces: list[str]) -> dict[str, Any]:
    """Return content, reasoning and calls of an answer that arrives in pieces."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for delta in [*(d for piece in pieces for d in parser.push(piece)), *parser.finish()]:
        if isinstance(delta, Content):
            found["content"] += delta.text
        elif isinstance(delta, Reasoning):
            found["reasoning"] += delta.text
        elif isinstance(delta, CallStart):
            found["calls"].append([delta.name, delta.id, ""])
        else:
            assert isinstance(delta, CallArguments)
            found["calls"][-1][2] += delta.text
    return found


def parsed(name: str, *pieces: str) -> dict[str, Any]:
    return fed(format_named(name).make(SCHEMAS), list(pieces))


def test_every_format_has_examples() -> None:
    assert EXAMPLES.keys() == {one.name for one in FORMATS}


@pytest.mark.parametrize(("name", "text"), ALL)
def test_calls_are_read(name: str, text: str) -> None:
    calls = [(call, json.loads(given)) for call, _, given in parsed(name, text)["calls"]]
    wanted = [[], *([list(one[:n]) for one in (TWO, TWICE) for n in (1, 2)]), [("run", {})]]
    assert calls in wanted
    assert calls or "final" in text
    if name != "harmony":
        assert len(calls) == 2 or calls == [("run", {})]


@pytest.mark.parametrize(("name", "text"), ALL)
def test_any_two_pieces_give_the_same(name: str, text: str) -> None:
    whole = parsed(name, text)
    for cut in range(len(text)):
        assert parsed(name, text[:cut], text[cut:]) == whole, text[:cut]
    assert parsed(name, *text) == whole


@given(st.sampled_from(ALL), st.data())
@settings(max_examples=150)
def test_any_pieces_of_any_beginning_give_the_same(example, data) -> None:
    """Also where the answer was cut, with text of other kinds behind it."""
    name, text = example
    text = text[: data.draw(st.integers(0, len(text)))] + data.draw(
        st.sampled_from(["", "<", "</tool_call>", '{"name"', "\n```", "[ARGS]", "é"])
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(name, *pieces) == parsed(name, text)


@given(st.sampled_from([one.name for one in FORMATS]), st.data())
@settings(max_examples=150)
def test_anything_is_read_in_any_pieces(name: str, data) -> None:
    markers = [one for one in format_named(name).markers if one]
    words = [*markers, "{", "}", "[", "]", '"', '"name": "f"', ",", ":", "\\", "\n", "a", " "]
    pieces = data.draw(st.lists(st.sampled_from(words), max_size=25))
    assert parsed(name, *pieces) == parsed(name, "".join(pieces))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("hermes", "Hello.\n" + hermes(TWO[0]), "Hello.\n"),
        ("hermes", "<tool_call>\nno object</tool_call>", "<tool_call>\nno object</tool_call>"),
        ("hermes", 'a <tool_call>{"x": 1}</tool_call> b', 'a <tool_call>{"x": 1} b'),
        ("hermes", "a <tool_", "a <tool_"),
        ("glm45", "a < b", "a < b"),
        ("mistral", "[not a call]", "[not a call]"),
        ("harmony", "no channel", "no channel"),
        ("harmony", "<|channel|>final<|message|>a<|end|>", "a"),
        ("harmony", "<|channel|>final", ""),
    ],
)
def test_other_text_is_content(name: str, text: str, said: str) -> None:
    assert parsed(name, text)["content"] == said


@pytest.mark.parametrize(
    ("name", "text", "call"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', ["f", None, '{"a": 1}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}', ["f", None, "{}"]),
        ("hermes", '<tool_call>{"name": "f", "parameters": {"a": [}', ["f", None, '{"a": [}']),
        ("hermes", '<tool_call>{"name": "f"}', ["f", None, "{}"]),
        ("kimi_k2", kimi(("f", {})), ["f", "functions.f:0", "{}"]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}", ["f", "abc", "{}"]),
        ("harmony", harmony(("f", {"a": 1})), ["f", None, '{"a": 1}']),
        ("qwen3_coder", qwen_coder(("f", {"a": True, "b": "x y"})),
         ["f", None, '{"a": true, "b": "x y"}']),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>NaN</parameter>",
         ["f", None, '{"a": "NaN"}']),
        ("glm45", "<tool_call>f<arg_key>a</arg_key><arg_value>1", ["f", None, '{"a": 1}']),
        ("minimax_m2", minimax(("weather", {"city": "5"})), ["weather", None, '{"city": "5"}']),
    ],
)  # fmt: skip
def test_unusual_calls(name: str, text: str, call: list[Any]) -> None:
    assert parsed(name, text)["calls"] == [call]


REASONING = [
    (False, "<think>\nhm\n</think>\n\nYes", "hm", "Yes"),
    (False, "\n<think>hm", "hm", ""),
    (False, "<thin", "", "<thin"),
    (False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
    (True, "hm\n</think>\n\nYes", "hm", "Yes"),
    (True, "hm", "hm", ""),
    (True, "<think>hm</think>", "hm", ""),
]


@pytest.mark.parametrize(("begun", "text", "thought", "said"), REASONING)
def test_reasoning_is_split_off(begun: bool, text: str, thought: str, said: str) -> None:
    for cut in range(len(text) + 1):
        one = ReasoningParser("<think>", "</think>", begun=begun, rest=PlainParser())
        found = fed(one, [text[:cut], text[cut:]])
        assert (found["reasoning"], found["content"]) == (thought, said)


def test_reasoning_comes_before_calls() -> None:
    text = "hm</think>\n\nI look.\n" + hermes(*TWO)
    for cut in range(len(text) + 1):
        inner = format_named("hermes").make(SCHEMAS)
        one = ReasoningParser("<think>", "</think>", begun=True, rest=inner)
        found = fed(one, [text[:cut], text[cut:]])
        assert (found["reasoning"], found["content"].strip()) == ("hm", "I look.")
        assert [call[0] for call in found["calls"]] == ["weather", "run"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\n{'name'", "hermes"),
        ("<tool_call>\n<function=", "qwen3_coder"),
        ("<tool_call>{{ n }}\n<arg_key>", "glm45"),
        ("<minimax:tool_call>", "minimax_m2"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<｜tool▁calls▁begin｜>```json", "deepseek_v3"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("<|start|><|channel|>", "harmony"),
        ("[TOOL_CALLS]", "mistral_json"),
        ("[TOOL_CALLS][ARGS]", "mistral"),
        ("<|tool_call|>", "granite"),
        ("```json", None),
        ("", None),
    ],
)
def test_formats_are_found_in_templates(template: str, name: str | None) -> None:
    found = format_of(template)
    assert (found and found.name) == name


def test_reasoning_is_found_in_templates() -> None:
    assert thinking_of("x") is None
    for one in THINKING:
        assert thinking_of(f"x{one.closes}") is one is thinking_named(one.name)


def test_unknown_names_raise() -> None:
    with pytest.raises(ConfigError, match=r"--tool-parser llama is not known; use auto, none, dee"):
        format_named("llama")
    with pytest.raises(ConfigError, match="--reasoning-parser x is not known; use auto, none, th"):
        thinking_named("x")


MARKED = {"city": "a", "days": ["</parameter>", "</arg_value>", "<|tool_call_end|>", "<|end|>"]}


@pytest.mark.parametrize(
    ("name", "text", "calls", "content"),
    [
        ("qwen3_coder", qwen_coder(("weather", MARKED)), [MARKED], ""),
        ("glm45", glm(("weather", MARKED)), [MARKED], ""),
        ("minimax_m2", minimax(("weather", MARKED)), [MARKED], ""),
        ("kimi_k2", kimi(("weather", MARKED)), [MARKED], ""),
        ("harmony", harmony(("weather", MARKED)) + "<|call|>", [MARKED], ""),
        ("mistral", '[TOOL_CALLS]weather{"days": 1}', [{"days": 1}], ""),
        ("hermes", "Use the <tool_call> tag.\nMore.", [], "Use the <tool_call> tag.\nMore."),
        ("hermes", hermes(("weather", ROME)).removesuffix("</tool_call>")
         + hermes(("weather", PARIS)), [ROME, PARIS], ""),
    ],
)  # fmt: skip
def test_markers_within_texts_and_missing_ones(name, text, calls, content) -> None:
    for pieces in ([text], list(text)):
        found = fed(format_named(name).make(SCHEMAS), pieces)
        assert [json.loads(given) for _, _, given in found["calls"]] == calls
        assert found["content"] == content
