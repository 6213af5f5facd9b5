"""POST /v1/responses: conversion to chat completions, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, fake_service

from moefit.serve.model import ServedModel
from tests.server.tools.test_parsers import TWO, hermes
from tests.server.tools.test_tool_calls import ECHO, template

URL = "/v1/responses"
TOOLS = [
    {"type": "function", "name": name, "parameters": {"properties": properties}}
    for name, properties in ECHO.items()
]
ANSWER = "<think>\nhm\n</think>\n\nI look.\n" + hermes(*TWO)


@pytest.fixture
def running(served: ServedModel) -> Iterator[tuple[TestClient, Any]]:
    served.tokenizer.chat_template = template("<tool_call> <think>")
    with fake_service(served) as (service, engine), client_of(service) as client:
        engine.tokens = lambda _: served.tokenizer(ANSWER)["input_ids"]
        yield client, engine
    served.tokenizer.chat_template = None


def frames_of(response: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names are their types."""
    found = []
    for block in response.text.split("\n\n")[:-2]:
        name, data = block.split("\n", 1)
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    return found


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in one.items() if k not in ("id", "call_id")} for one in items]


def test_items_of_a_response(running) -> None:
    client, _ = running
    answer = client.post(URL, json={"input": "hi", "tools": TOOLS, "max_output_tokens": 300}).json()
    assert answer["object"] == "response" and answer["status"] == "completed"
    thought, said, first, second = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert said["content"][0]["text"] == "I look." and said["role"] == "assistant"
    for item, (name, given) in zip((first, second), TWO, strict=True):
        assert (item["type"], item["name"]) == ("function_call", name)
        assert json.loads(item["arguments"]) == given
    assert answer["usage"]["total_tokens"] == sum(
        answer["usage"][name] for name in ("input_tokens", "output_tokens")
    )
    assert answer["tools"][0]["name"] == "weather" and answer["tool_choice"] == "auto"


@pytest.mark.parametrize(("most", "status"), [(300, "completed"), (9, "incomplete")])
def test_stream_equals_the_whole(running, most: int, status: str) -> None:
    client, _ = running
    body = {"input": "hi", "tools": TOOLS, "max_output_tokens": most}
    whole = client.post(URL, json=body).json()
    frames = frames_of(client.post(URL, json={**body, "stream": True}))
    last = frames[-1]
    assert last["type"] == f"response.{status}" and last["response"]["usage"] == whole["usage"]
    assert whole["status"] == whole["output"][-1]["status"] == status
    assert {one["status"] for one in whole["output"][:-1]} <= {"completed"}
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    done = [one["item"] for one in frames if one["type"] == "response.output_item.done"]
    assert done == last["response"]["output"]
    said: dict[str, str] = {}
    for one in frames:
        if one["type"].endswith(".delta"):
            said[one["item_id"]] = said.get(one["item_id"], "") + one["delta"]
    wanted = [one["arguments"] if "arguments" in one else one["content"][0]["text"] for one in done]
    assert [said[one["id"]] for one in done] == wanted


def test_conversation_is_rendered(running, served) -> None:
    client, engine = running
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "a", "name": "run", "arguments": '{"code": "x"}'},
        {"type": "function_call_output", "call_id": "a", "output": "fine"},
    ]
    body = {"input": items, "instructions": "be brief", "tools": TOOLS, "max_output_tokens": 9}
    body["include"] = ["reasoning.encrypted_content"]  # as agents ask for without storing
    answer = client.post(URL, json=body).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    prompt = served.tokenizer.decode(engine.submitted[0][0])
    assert '<system>be brief<user>hello<assistant>run{"code": "x"}<tool>fine' in prompt


def test_effort_of_reasoning_reaches_the_template(running, served) -> None:
    client, engine = running
    asked = {"input": "hi", "reasoning": {"effort": "low", "summary": "auto"}}
    error = error_of(client.post(URL, json=asked), 400)
    assert "no reasoning_effort" in error["message"] and "reasoning.effort" in error["message"]
    served.tokenizer.chat_template = "{{ reasoning_effort }}|" + template("<tool_call>")
    answer = client.post(URL, json=asked).json()
    assert served.tokenizer.decode(engine.submitted[-1][0]).startswith("low|")
    assert answer["reasoning"]["effort"] == "low"
    answer = client.post(URL, json={"input": "hi", "reasoning": {"summary": "auto"}}).json()
    assert answer["status"] == "completed" and answer["reasoning"]["effort"] is None


def test_calls_of_tools_that_do_not_exist_may_be_sent_back(running, served) -> None:
    """A model may write any name, and an agent answers that there is no such tool."""
    client, engine = running
    wrong = "no such <b>tool</b>"
    engine.tokens = lambda _: served.tokenizer(hermes((wrong, {})))["input_ids"]
    (call,) = client.post(URL, json={"input": "hi", "tools": TOOLS}).json()["output"]
    assert call["name"] == wrong
    items = [
        {"role": "user", "content": "hi"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "unknown"},
    ]
    response = client.post(URL, json={"input": items, "tools": TOOLS})
    assert response.status_code == 200, response.text
    prompt = served.tokenizer.decode(engine.submitted[-1][0])
    assert f"<user>hi<assistant>{wrong}{{}}<tool>unknown" in prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"input": []}, "input"),
        ({"input": [{"type": "input_image"}]}, "input[0].type"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, None),
    ],
)
def test_unsupported_parameters_are_named(running, body, param: str | None) -> None:
    client, _ = running
    error = error_of(client.post(URL, json={"input": "hi", **body}), 400)
    assert param is None or error["param"] == param


def test_embeddings_are_not_offered(running) -> None:
    error = error_of(running[0].post("/v1/embeddings", json={"input": "x"}), 404)
    assert "without embeddings" in error["message"]
