"""Chat templates in a separate process: equal to transformers, and harmless."""

import json
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moefit.errors import ConfigError, RefusedError, RequestTooLargeError
from moefit.evaluate.loading import reference_path
from moefit.server.template_worker import ChatTemplate
from moefit.server.tokenizer import Renderer, RequestTokenizer

TURNS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As Llava's and others': parts alone.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for item in m.content %}{% if item.type == 'text' %}"
    "{{ item.text }}{% endif %}{% endfor %}{% endfor %}<assistant>"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m['content'][0]['text'] }}{% endfor %}"
SYSTEM_IS_TEXT = (
    "{% if messages[0].role == 'system' %}{{ '<<' + messages[0].content + '>>' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'user' %}{{ m.content | map(attribute='text') | join('') }}{% else %}"
    "{{ m.content + '.' }}{% endif %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for item in m.content %}[{{ item.text }}]{% endfor %}{% endif %}{% endfor %}"
)
LATE_SYSTEM = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages if m.role == 'system' -%}"
    "{%- set ns.system = m.content -%}{%- endfor -%}{%- for m in messages if m.role != 'system' -%}"
    "{%- if loop.last and ns.system -%}{{ ns.system ~ '\n\n' }}{%- endif -%}"
    "[{{ m.role }}]{{ m.content }}{%- if loop.last -%}{%- break -%}{%- endif -%}{%- endfor -%}"
)
REASONING = (
    "{%- for m in messages -%}{{ m.role }}:{% if m.reasoning_content is defined %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}{{ '\n' }}"
    "{%- endfor -%}{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and "
    "enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
EXTENSIONS = (
    "{{ strftime_now('%Y') | length }}{% set d = dict(a=1) %}{{ d | tojson(indent=2) }}"
    "{{ {'ü': [1, '<']} | tojson }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% continue %}"
    "{% endif %}{% endfor %}{{ undefined_name }}{% if tools is none and documents is none %}!"
    "{% endif %}{% macro f(x) %}({{ x }}){% endmacro %}{{ f(messages | length) }}"
)
SAME_TEXT = [TURNS, EITHER, LATE_SYSTEM, REASONING, EXTENSIONS]
TALKS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief. \ud83d"},
        {"role": "user", "content": "<b>a & b</b> {{ x }}", "name": "Ann"},
        {"role": "assistant", "content": "<think>hm</think>yes", "reasoning_content": "why"},
        {"role": "user", "content": "  and ünïcödé 😀\u2028\n"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(reference_path())


def written(template: str, talk: list[dict[str, Any]], **bounds: Any) -> str:
    renderer = Renderer(template, **bounds)
    try:
        return renderer.render(talk, {}, longest=10_000)
    finally:
        renderer.close()


@pytest.mark.parametrize("template", SAME_TEXT)
@pytest.mark.parametrize("talk", TALKS)
def test_text_equals_transformers(tokenizer, template: str, talk) -> None:
    tokenizer.chat_template = template
    words = RequestTokenizer(tokenizer, size=4096, max_tokens=1000)
    for values in ({}, {"enable_thinking": False, "bos_token": "^"}):
        expected = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=False, **values
        )
        assert words.conversation(talk, values) == expected
    words.close()


def in_parts(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in talk]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PARTS, "<system>s<user>user<assistant>system<user>u<assistant>"),
        (FIRST_PART, "<system>s<user>user<assistant>system<user>u"),
        (SYSTEM_IS_TEXT, "<<s>><user>user<assistant>system.<user>u"),
        (EITHER, "<system>s<user>user<assistant>system<user>u"),
    ],
)
def test_content_forms_work_with_all_templates(template, expected) -> None:
    """The texts also occur in the templates themselves, so that finding them proves nothing."""
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "system"},
        {"role": "user", "content": "u"},
    ]
    renderer = Renderer(template)
    for asked in (talk, in_parts(talk), talk[:1] + in_parts(talk)[1:]):
        for _ in range(2):
            assert renderer.render(asked, {}, longest=1000) == expected
    renderer.close()


@pytest.mark.parametrize(
    ("template", "index"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", 0),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", 0),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", 2),
        ("{{ messages | length }}", 0),
    ],
)
def test_content_dropped_by_template_raises(template: str, index: int) -> None:
    talk = [
        {"role": "system", "content": "Answer in verse, if you can do so."},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "s"},
    ]
    with pytest.raises(ConfigError, match=rf"messages\[{index}\]\.content.*drops the"):
        written(template, talk)


def test_content_changed_by_template_is_accepted() -> None:
    talk = [
        {"role": "user", "content": "a long enough text of the user's, in small letters"},
        {"role": "assistant", "content": "<think>long thoughts that are not said again</think>"},
        {"role": "user", "content": "b"},
    ]
    template = "{% for m in messages if m.role == 'user' %}{{ m.content | upper }}|{% endfor %}"
    assert written(template, talk) == f"{talk[0]['content'].upper()}|B|"


HARMFUL = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "number": "{{ (9 + messages | length) ** 100000000 }}",
    "long": "{{ 'a' * 900000000 }}",
    "doubled": "{% set n = namespace(v='a') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}"
    "{% endfor %}{{ n.v }}",
    "field": "{{ '%999999999d' % 5 }}",
    "deep": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "broken": "{% if %}",
    "raises": "{{ raise_exception('never') }}",
    "missing": "{{ messages[0].tool.name }}",
}
_MEMORY = "192 MiB|did not end within"  # whichever comes first on a busy machine
WHY = {
    "loop": "did not end within 1 seconds", "number": "did not end within 1 seconds",
    "long": _MEMORY, "doubled": _MEMORY, "field": _MEMORY, "deep": "recursion",
    "broken": "is invalid", "raises": "rejects these messages: never",
    "missing": "'dict object' has no attribute 'tool'",
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMFUL)
def test_failing_template_is_reported(kind: str) -> None:
    template = "{% if messages[0].content == 'x' %}" + HARMFUL[kind] + "{% endif %}"
    template += "ok{{ messages[0].content }}"
    renderer = Renderer(template, seconds=1.0)
    began = monotonic()
    with pytest.raises(ConfigError, match=WHY[kind]):
        renderer.render([{"role": "user", "content": "x"}], {}, longest=1000)
    assert monotonic() - began < 10
    if kind != "broken":
        assert renderer.render([{"role": "user", "content": "y"}], {}, longest=1000) == "oky"
    renderer.close()


def test_too_long_text_names_size() -> None:
    with pytest.raises(RequestTooLargeError, match="20,002"):
        written("{{ messages[0].content * 10001 }}", [{"role": "user", "content": "ab"}])


def test_templates_do_not_see_api_keys(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer = Renderer(TURNS)
    renderer.render(TALKS[0], {}, longest=1000)
    assert renderer._process is not None
    with open(f"/proc/{renderer._process._child.pid}/environ", "rb") as environment:
        assert b"secret" not in environment.read()
    renderer.close()


@pytest.fixture
def looping() -> Iterator[Renderer]:
    renderer = Renderer("{{ messages[0].content }}" + HARMFUL["loop"], seconds=60.0)
    yield renderer
    renderer.close()


def test_closing_stops_rendering(looping: Renderer) -> None:
    raised: list[Exception] = []

    def ask() -> None:
        try:
            looping.render(TALKS[0], {}, longest=1000)
        except RefusedError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(timeout=1.0)
    assert thread.is_alive()
    looping.close()
    thread.join(timeout=10.0)
    assert not thread.is_alive() and raised
    with pytest.raises(RefusedError):
        looping.render(TALKS[0], {}, longest=1000)


def test_killed_process_is_replaced() -> None:
    renderer = Renderer("{{ messages[0].content }}")
    for _ in range(2):
        assert renderer.render(TALKS[0], {}, longest=1000) == "hi"
        assert renderer._process is not None
        renderer._process.kill()
        renderer._process._child.wait()
    renderer.close()


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


def called(given: str, result: str) -> list[dict[str, Any]]:
    call = {"id": "a", "function": {"name": "f", "arguments": given}}
    return [
        {"role": "user", "content": "set it please"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "a"},
    ]


def test_arguments_and_tools_may_look_like_parts() -> None:
    schema = {"properties": {"c": {"default": {"type": "text"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    template = ChatTemplate(CALLS)
    for given in ('{"type": "text"}', '{"type":"text"}', '{"v": [{"type": "text"}]}'):
        answer = template.render(called(given, "ok"), {}, [tool])
        assert f"<assistant>f{json.dumps(json.loads(given))}<tool>ok" in answer["text"]
        (last,) = PARTS_CALL.render(called(given, "ok"), {})["text"].split("<tool>")[1:]
        assert last == "ok"


PARTS_CALL = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content[0].text }}"
    "{% else %}{{ m.content or '' }}{% endif %}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


def test_one_conversation_does_not_change_the_next() -> None:
    template = ChatTemplate(CALLS)
    for result in ("got {'a': 'b'}", "ok"):
        text = template.render(called('{"a": "b"}', result), {})["text"]
        assert text.endswith(f'<assistant>f{{"a": "b"}}<tool>{result}')
    printing = ChatTemplate(CALLS.replace("arguments | tojson", "arguments"))
    for result in ("ok", "got {'a': 'b'}"):  # arguments that Python would print stay JSON
        text = printing.render(called('{"a": "b"}', result), {})["text"]
        assert text.endswith(f'<assistant>f{{"a": "b"}}<tool>{result}')
