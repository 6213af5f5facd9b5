"""POST /v1/chat/completions, with and without a chat template."""

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, events, fake_service

from moefit.serve.model import ServedModel

URL = "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def running(served: ServedModel) -> Iterator[tuple[TestClient, FakeEngine]]:
    served.tokenizer.chat_template = TEMPLATE
    with fake_service(served, chat_tokens=20) as (service, engine), client_of(service) as client:
        yield client, engine
    served.tokenizer.chat_template = None


def ids_of(served: ServedModel, text: str) -> list[int]:
    return served.tokenizer(text)["input_ids"]


def test_template_formats_conversation(running, served) -> None:
    client, engine = running
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "d"},
    ]
    engine.tokens = lambda prompt: ids_of(served, "yes 😀")
    answer = client.post(URL, json={"model": "reference", "messages": messages}).json()
    (prompt, sampling) = engine.submitted[0]
    text = "<system>be brief<user>ab<assistant>c<user>d<assistant>"
    assert list(prompt) == ids_of(served, text)
    assert (sampling.max_tokens, sampling.temperature, sampling.logprobs) == (20, 1.0, None)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "yes 😀", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_stream_equals_full_response(running, served) -> None:
    client, engine = running
    engine.tokens = lambda prompt: ids_of(served, "yes 😀, of course")
    asked = {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 1, "max_tokens": 30}
    whole = client.post(URL, json=asked).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    frames = events(client.post(URL, json={**asked, **options}))
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert frames[-1]["usage"] == whole["usage"] and frames[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [one for f in frames for one in f["choices"] if one["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == choice["finish_reason"]
        said = "".join(one["delta"].get("content", "") for one in mine)
        assert said == choice["message"]["content"] == "yes 😀, of course"
        told = [x for one in mine if one["logprobs"] for x in one["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_logprobs_name_bytes(running, served) -> None:
    client, engine = running
    engine.tokens = lambda prompt: ids_of(served, "é😀!")
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post(URL, json=asked).json()["choices"]
    told = choice["logprobs"]["content"]
    assert bytes(b for one in told for b in one["bytes"]).decode() == "é😀!"
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    without = client.post(URL, json={"messages": HELLO, "logprobs": True}).json()
    assert without["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_both_names_limit_tokens(running) -> None:
    client, engine = running
    for asked in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.post(URL, json={"messages": HELLO, **asked}).json()
        assert answer["usage"]["completion_tokens"] == 3
    assert [sampling.max_tokens for _, sampling in engine.submitted] == [3, 3]


def test_neutral_parameters_are_accepted(running) -> None:
    client, _ = running
    asked = {
        "messages": HELLO, "n": 1, "tools": None, "tool_choice": "none", "functions": [],
        "response_format": {"type": "text"}, "logit_bias": None, "store": True,
        "metadata": {"a": [{}]}, "min_p": 0, "repetition_penalty": 1.0, "top_k": -1, "new": None,
        "logprobs": False, "top_logprobs": 0, "echo": False, "add_generation_prompt": True,
        "continue_final_message": False, "suffix": "", "best_of": 1,
        "modalities": ["text"], "service_tier": "auto", "parallel_tool_calls": True, "user": "me",
        "presence_penalty": 0, "top_p": 1, "stop": None, "reasoning_effort": None, "seed": 5,
    }  # fmt: skip
    assert client.post(URL, json=asked).status_code == 200


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{**HELLO[0], "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [*HELLO, {"role": "user", "content": None}]}, "messages[1].content"),
        ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": 1}, "store"),
    ],
)
def test_unsupported_parameters_raise(running, asked, param) -> None:
    client, engine = running
    error = error_of(client.post(URL, json={"messages": HELLO, **asked}), 400)
    assert error["param"] == param
    assert not engine.submitted


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image_url", "image_url (an image)"),
        ("input_audio", "input_audio (a sound)"),
        ("file", "file (a file)"),
    ],
)
def test_non_text_content_raises(running, kind: str, words: str) -> None:
    client, _ = running
    parts = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {}}]
    asked = {"messages": [*HELLO, {"role": "user", "content": parts}]}
    error = error_of(client.post(URL, json=asked), 400)
    assert error["param"] == "messages[1].content[1]"
    assert f"messages[1].content[1]: parts of type {words} are not supported" in error["message"]


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ({}, ""),
        ({"content": None}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": [{"type": "refusal", "refusal": "never"}]}, "never"),
        ({"content": "c", "tool_calls": [], "function_call": None, "audio": None}, "c"),
        ({"content": "c", "reasoning_content": "hm"}, "(hm)c"),
        ({"content": "c", "reasoning": "hm", "reasoning_content": None}, "(hm)c"),
        ({"content": "c", "provider_specific_fields": {"refusal": None}, "annotations": []}, "c"),
        ({"content": "c", "name": "Bot", "type": "text"}, "Bot:c"),
    ],
)
def test_assistant_messages_are_accepted(running, served, answer, written: str) -> None:
    client, engine = running
    served.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.name %}{{ m.name }}:{% endif %}{% if m.reasoning_content %}"
        "({{ m.reasoning_content }}){% endif %}{{ '' + m.content }};{% endfor %}"
    )
    messages = [*HELLO, {"role": "assistant", **answer}, *HELLO]
    assert client.post(URL, json={"messages": messages}).status_code == 200
    assert list(engine.submitted[0][0]) == ids_of(served, f"hello;{written};hello;")


def test_template_variables(running, served) -> None:
    client, engine = running
    served.tokenizer.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking is false %}<no>{% endif %}"
    )
    asked = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert client.post(URL, json=asked).status_code == 200
    assert list(engine.submitted[0][0]) == ids_of(served, "hello<no>")
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert tokens == ids_of(served, "hello<no>")


def test_template_errors_are_reported(running) -> None:
    client, _ = running
    messages = [*HELLO, {"role": "system", "content": "late"}]
    error = error_of(client.post(URL, json={"messages": messages}), 400)
    assert "the system speaks first" in error["message"]


def test_missing_template_suggests_completions(served) -> None:
    with fake_service(served) as (service, _), client_of(service) as client:
        error = error_of(client.post(URL, json={"messages": HELLO}), 400)
        assert error["code"] == "no_chat_template" and "/v1/completions" in error["message"]
        assert client.get("/v1/models").json()["data"][0]["chat"] is False
