"""Tools over HTTP: the shipped model, restricted to calls in the form of each family."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
from engines import running
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, events, fake_service

from moefit.serve.model import ServedModel
from moefit.server.middleware import ServerSettings
from moefit.server.service import Service
from moefit.server.tools.formats import FORMATS
from tests.server.tools.test_parsers import EXAMPLES, TWO, harmony, hermes

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "stop_it": NOTHING}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
TEMPLATE = (
    "{{%- if tools %}}{{{{ tools | tojson }}}}{{% endif %}}"
    "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content or '' }}}}"
    "{{% for c in m.tool_calls or [] %}}{{{{ c.function.name }}}}"
    "{{{{ c.function.arguments | tojson }}}}{{% endfor %}}{{% endfor %}}<assistant>{{# {signs} #}}"
)


def template(*signs: str) -> str:
    return TEMPLATE.format(signs=" ".join(signs))


SIGNS = {one.name: one.sign for one in FORMATS} | {"deepseek_v3": "```json <｜tool▁calls▁begin｜>"}


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[TestClient]:
    served.tokenizer.chat_template = template("<tool_call>")
    with running(served, max_model_len=700) as engine:
        service = Service(engine, ServerSettings(name="reference"))
        with client_of(service) as one:
            yield one
        service.close()
    served.tokenizer.chat_template = None


@pytest.fixture(autouse=True)
def _template(served: ServedModel) -> None:
    served.tokenizer.chat_template = template("<tool_call>")


def asked(client: TestClient, **body: Any) -> dict[str, Any]:
    given = {"messages": HELLO, "tools": TOOLS, "max_tokens": 250, "seed": 3, **body}
    response = client.post(URL, json=given)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def checked(choice: dict[str, Any]) -> list[str]:
    """Return the names of the calls, whose arguments match their schemas."""
    assert choice["finish_reason"] == "tool_calls"
    for call in choice["message"]["tool_calls"]:
        assert call["type"] == "function" and call["id"]
        schema = SCHEMAS[call["function"]["name"]]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    return [call["function"]["name"] for call in choice["message"]["tool_calls"]]


QUICK = ("hermes", "harmony", "qwen3_coder", "deepseek_v31")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in SIGNS],
)
def test_required_calls_are_valid_in_every_form(client, served, name: str) -> None:
    served.tokenizer.chat_template = template(SIGNS[name])
    choice = asked(client, tool_choice="required", parallel_tool_calls=False)
    assert len(checked(choice)) == 1
    assert choice["message"]["content"] is None
    named = {"type": "function", "function": {"name": "stop_it"}}
    choice = asked(client, tool_choice=named, parallel_tool_calls=False)
    assert checked(choice) == ["stop_it"]


def test_streams_add_up_to_the_whole(client) -> None:
    body = {"tool_choice": "required", "parallel_tool_calls": False}
    whole = asked(client, **body)
    given = {"messages": HELLO, "tools": TOOLS, "max_tokens": 250, "seed": 3, "stream": True}
    frames = events(client.post(URL, json={**given, **body}))
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert {part["index"] for part in parts} == {0}
    assert parts[0]["function"]["name"] == whole["message"]["tool_calls"][0]["function"]["name"]
    assert parts[0]["id"] and all("id" not in part for part in parts[1:])
    text = "".join(part["function"]["arguments"] for part in parts)
    assert text == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert len(parts) > 3
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "kimi_k2", "harmony"])
def test_strict_tools_and_auto(client, served, name: str) -> None:
    """The model may answer with text; if it calls, the arguments are valid."""
    served.tokenizer.chat_template = template(SIGNS[name])
    strict = [
        {"type": "function", "function": {**one["function"], "strict": True}} for one in TOOLS
    ]
    choice = asked(client, tools=strict, max_tokens=12)
    assert choice["finish_reason"] in ("length", "stop")


def test_response_format_beside_tools(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER}}
    strict = [{"function": {**one["function"], "strict": True}} for one in TOOLS]
    choice = asked(client, tools=strict, response_format=form, parallel_tool_calls=False)
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), WEATHER)
    else:
        checked(choice)


def test_reasoning_comes_before_a_required_form(client, served) -> None:
    served.tokenizer.chat_template = template("<tool_call>") + "<think>\n"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}
    choice = asked(client, tools=None, response_format=form, stop=["\n"], max_tokens=30)
    assert set(choice["message"]) >= {"reasoning_content"}
    served.tokenizer.chat_template = template("<tool_call>") + "<think>\n\n</think>\n\n"
    choice = asked(client, tools=None, response_format=form)
    assert choice["message"]["content"].strip() == "5"


@pytest.fixture
def fake(served: ServedModel) -> Iterator[Any]:
    with fake_service(served) as (service, engine), client_of(service) as one:
        yield one, engine


ECHO = {"weather": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "run": {"code": {"type": "string"}, "opts": {"type": "object"}}}  # fmt: skip
ECHO_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
    for name, properties in ECHO.items()
]


@pytest.mark.parametrize("name", SIGNS)
def test_parsed_calls_are_streamed(fake, served, name: str) -> None:
    client, engine = fake
    served.tokenizer.chat_template = template(SIGNS[name])
    text = next((one for one in EXAMPLES[name] if "run" in one), EXAMPLES[name][0])
    engine.tokens = lambda _: served.tokenizer(text)["input_ids"]
    body = {"messages": HELLO, "tools": ECHO_TOOLS, "max_tokens": 400}
    (choice,) = client.post(URL, json=body).json()["choices"]
    wanted = TWO[:1] if name == "harmony" else TWO
    calls = [one["function"] for one in choice["message"]["tool_calls"]]
    assert [(one["name"], json.loads(one["arguments"])) for one in calls] == list(wanted)
    frames = events(client.post(URL, json={**body, "stream": True}))
    found: dict[int, list[str]] = {}
    for frame in frames:
        for part in frame["choices"][0]["delta"].get("tool_calls", ()):
            one = found.setdefault(part["index"], ["", ""])
            one[0] += part["function"].get("name", "")
            one[1] += part["function"]["arguments"]
    assert list(found.values()) == [[one["name"], one["arguments"]] for one in calls]


def test_without_tools_texts_stay_whole(fake, served) -> None:
    client, engine = fake
    text = "I look.\n" + hermes(*TWO) + "\n"
    engine.tokens = lambda _: served.tokenizer(text)["input_ids"]
    for body in ({}, {"tools": ECHO_TOOLS, "tool_choice": "none"}):
        given = {"messages": HELLO, "max_tokens": 400, **body}
        (choice,) = client.post(URL, json=given).json()["choices"]
        assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"


def test_channels_are_split_without_tools(fake, served) -> None:
    client, engine = fake
    served.tokenizer.chat_template = template("<|channel|>")
    engine.tokens = lambda _: served.tokenizer(EXAMPLES["harmony"][3])["input_ids"]
    (choice,) = client.post(URL, json={"messages": HELLO, "max_tokens": 99}).json()["choices"]
    assert choice["message"]["content"] == "Yes!"
    assert choice["message"]["reasoning_content"] == "hm"
    assert harmony(*TWO)


def test_conversation_with_calls_is_rendered(fake, served) -> None:
    client, engine = fake
    call = {"id": "a1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}]},
        {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
    ]
    body = {"messages": messages, "tools": TOOLS}
    assert client.post(URL, json=body).status_code == 200
    prompt = served.tokenizer.decode(engine.submitted[0][0])
    assert '<assistant>weather{"city": "Rome"}<tool>sunny<assistant>' in prompt
    assert '"name": "stop_it"' in prompt
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tokens == list(engine.submitted[0][0])


@pytest.mark.parametrize("given", ['{"city": "Ro', "null", "[1]", '{"a":' * 3000, "it is no JSON"])
def test_cut_arguments_may_be_sent_back(fake, served, given: str) -> None:
    client, _ = fake
    served.tokenizer.chat_template = template("<tool_call>").replace(
        "c.function.arguments | tojson",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    )
    call = {"id": "a", "function": {"name": "f", "arguments": given, "parsed_arguments": None}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "parsed": None}
    messages = [*HELLO, said, {"role": "tool", "tool_call_id": "a", "content": "no"}]
    response = client.post("/tokenize", json={"messages": messages})
    assert response.status_code == 200, response.text
    prompt = served.tokenizer.decode(response.json()["tokens"])
    assert f"<assistant>f{given}<tool>no" in prompt


def test_reasoning_effort_reaches_the_template(fake, served) -> None:
    client, engine = fake
    served.tokenizer.chat_template = "{{ reasoning_effort }}|" + template("<tool_call>")
    body = {"messages": HELLO, "reasoning_effort": "low"}
    assert client.post(URL, json=body).status_code == 200
    assert served.tokenizer.decode(engine.submitted[0][0]).startswith("low|")
    served.tokenizer.chat_template = template("<tool_call>")
    error = error_of(client.post(URL, json=body), 400)
    assert error["param"] == "reasoning_effort" and error["code"] == "unsupported_by_model"


@pytest.mark.parametrize(
    "written",
    [
        "{{ '' + c.function.arguments }}",  # a text is needed, as by DeepSeek-V3
        "{{ c.function.arguments | tojson if c.function.arguments is mapping else 1 / 0 }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    ],
)
def test_templates_get_arguments_in_the_form_they_read(fake, served, written: str) -> None:
    client, engine = fake
    served.tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'assistant' and m.content is "
        "none %}{% for c in m.tool_calls %}{{ c.function.name }}" + written + "{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{# <tool_call> #}"
    )
    call = {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "content": "x"}]  # fmt: skip
    response = client.post(URL, json={"messages": messages, "tools": TOOLS})
    assert response.status_code == 200, response.text
    prompt = served.tokenizer.decode(engine.submitted[0][0])
    assert 'weather{"city": "Rome"}' in prompt or "weathercity=Rome" in prompt


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not am"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two tools"),
        ({"tools": [{"type": "function", "function": {"name": "<b>x</b>"}}]},
         "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tool_choice": "required", "tools": [{"function": {"name": "f",
          "parameters": {"properties": {"a": {"uniqueItems": True}}}}}]},
         "tools[0].function.parameters", "uniqueItems"),
    ],
)  # fmt: skip
def test_invalid_tools_are_named(client, body, param: str, words: str) -> None:
    error = error_of(client.post(URL, json={"messages": HELLO, "tools": TOOLS, **body}), 400)
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    ("schema", "param", "words"),
    [
        ({"properties": [1]}, ".properties", "an object"),
        ({"required": 5}, ".required", "a list"),
        ({"required": [{}]}, ".required", "names"),
        ({"properties": {"a": {"type": "string", "enum": 5}}}, ".properties.a.enum", "a list"),
        ({"properties": {"a": {"type": "string", "enum": []}}}, ".properties.a.enum", "one value"),
        ({"properties": {" a": {"type": "integer"}}}, "", "named ' a'"),
        ({"properties": {"": {"type": "integer"}}}, "", "named ''"),
    ],
)
def test_broken_schemas_of_elements_are_named(client, served, schema, param, words) -> None:
    served.tokenizer.chat_template = template(SIGNS["qwen3_coder"])
    tool = {"function": {"name": "f", "parameters": schema}}
    body = json.dumps({"messages": HELLO, "tools": [tool], "tool_choice": "required"})
    response = client.post(URL, content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["param"].startswith(f"tools[0].function.parameters{param}")
    assert words in error["message"]


def test_templates_that_show_no_tools_are_refused(client, served) -> None:
    served.tokenizer.chat_template = "{{ messages[0].content }}{# <tool_call> #}"
    error = error_of(client.post(URL, json={"messages": HELLO, "tools": TOOLS}), 400)
    assert "does not show tools" in error["message"]
    served.tokenizer.chat_template = "{{ messages[0].content }}"
    error = error_of(client.post(URL, json={"messages": HELLO, "tools": TOOLS}), 400)
    assert "--tool-parser" in error["message"] and error["code"] == "unsupported_by_model"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client, for `parsed`
def test_official_openai_client(client) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    one = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="x", http_client=client)
    given = {"model": "reference", "messages": HELLO, "tools": TOOLS, "max_tokens": 200, "seed": 3}
    given |= {"tool_choice": "required", "parallel_tool_calls": False}
    (call,) = one.chat.completions.create(**given).choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    with one.chat.completions.stream(**given) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    called = one.chat.completions.parse(**{**given, "tools": strict})
    again = [*HELLO, called.choices[0].message]
    again.append({"role": "tool", "tool_call_id": again[-1].tool_calls[0].id, "content": "ok"})
    one.chat.completions.create(model="reference", messages=again, max_tokens=1)

    class Answer(pydantic.BaseModel):
        days: Literal[1, 2]
        sure: bool

    parsed = one.chat.completions.parse(
        model="reference", messages=HELLO, response_format=Answer, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    again = [*HELLO, parsed.choices[0].message, *HELLO]
    one.chat.completions.create(model="reference", messages=again, max_tokens=1)
