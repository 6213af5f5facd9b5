"""POST /v1/completions, with a fake engine whose tokens are known."""

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, following
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, events, fake_service

from moefit.engine.sampler import Sampler
from moefit.serve.model import ServedModel
from moefit.server.service import Service

URL = "/v1/completions"


Running = tuple[TestClient, FakeEngine, Service]


@pytest.fixture
def own_server(served: ServedModel) -> Iterator[Running]:
    """For tests that change the engine."""
    with fake_service(served, answers=8) as (service, engine), client_of(service) as client:
        yield client, engine, service


@pytest.fixture(scope="module")
def one_server(served: ServedModel) -> Iterator[Running]:
    with fake_service(served, answers=8) as (service, engine), client_of(service) as client:
        yield client, engine, service


@pytest.fixture
def running(one_server: Running) -> Running:
    """The server of all tests, before its first request."""
    one_server[1].submitted.clear()
    return one_server


def made(served: ServedModel, last: int, count: int) -> list[int]:
    tokens = []
    for _ in range(count):
        last = following(last, served.model.config.vocab_size)
        tokens.append(last)
    return tokens


def text_of(served: ServedModel, tokens: list[int]) -> str:
    text = served.tokenizer.decode(tokens)
    assert isinstance(text, str)
    return text


def ids_of(served: ServedModel, text: str) -> list[int]:
    return served.tokenizer(text)["input_ids"]


def test_default_is_sixteen_tokens(running, served) -> None:
    client, _, _ = running
    answer = client.post(URL, json={"model": "reference", "prompt": "import os"}).json()
    prompt = ids_of(served, "import os")
    tokens = made(served, prompt[-1], 16)
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(served, tokens).rstrip("\ufffd")
    assert choice["finish_reason"] == "length"
    assert choice["index"] == 0 and choice["logprobs"] is None
    assert answer["object"] == "text_completion" and answer["model"] == "reference"
    assert answer["id"].startswith("cmpl-")
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 16}
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["usage"] == {**usage, "total_tokens": len(prompt) + 16, **details}


@pytest.mark.parametrize(
    "prompt",
    ["import os", ["import os"], [11, 12, 13], [[11, 12, 13]], ["a", "b c"], [[5], [6, 7]]],
)
def test_prompt_forms_and_n_choices(running, served, prompt) -> None:
    client, engine, _ = running
    asked = {"prompt": prompt, "n": 2, "seed": 3, "max_tokens": 4}
    engine.cached_tokens = 16
    answer = client.post(URL, json=asked).json()
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [ids_of(served, one) if isinstance(one, str) else one for one in several]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(ids)))
    expected = [made(served, one[-1] + 3 + k, 4) for one in ids for k in range(2)]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [text_of(served, one).rstrip("\ufffd") for one in expected]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 8 * len(ids)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16 * len(ids)}
    assert {sampling.seed for _, sampling in engine.submitted} == {3, 4}


def test_echoed_logprobs_for_lm_eval(running, served) -> None:
    client, engine, _ = running
    prompt = ids_of(served, "def f(x):\n    return x")
    asked = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    (choice,) = client.post(URL, json=asked).json()["choices"]
    (new,) = made(served, prompt[-1], 1)
    told = choice["logprobs"]
    assert choice["text"] == text_of(served, [*prompt, new]).rstrip("\ufffd")
    assert len(told["tokens"]) == len(prompt) + 1
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    expected = [-1.5 - token / 8192 for token in [*prompt[1:], new]]
    assert told["token_logprobs"][1:] == pytest.approx(expected)
    for name, logprob, top in zip(
        told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True
    ):
        assert top[name] == logprob and max(top.values()) == -0.25 and len(top) == 2
    for name, offset in zip(told["tokens"][:-1], told["text_offset"][:-1], strict=True):
        assert choice["text"][offset:].startswith(name)
    (_, sampling) = engine.submitted[0]
    assert (sampling.prompt_logprobs, sampling.logprobs, sampling.temperature) == (1, 1, 0)


def test_echo_without_generation(running, served) -> None:
    client, _, _ = running
    asked = {"prompt": "import os", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = client.post(URL, json=asked).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "import os"
    assert len(choice["logprobs"]["tokens"]) == len(ids_of(served, "import os"))
    assert answer["usage"]["completion_tokens"] == 0


def test_offsets_count_characters(own_server, served) -> None:
    client, engine, _ = own_server
    tokens = ids_of(served, "é😀!")
    engine.tokens = lambda prompt: tokens
    (choice,) = client.post(URL, json={"prompt": "x", "logprobs": 2}).json()["choices"]
    assert choice["text"] == "é😀!"
    told = choice["logprobs"]
    assert told["text_offset"][-1] == 2
    assert told["tokens"][-1] == "!"
    names = [name for name in told["tokens"] if name.startswith("bytes:")]
    said = "".join(name.removeprefix("bytes:") for name in names)
    assert "\\xf0" in said and "\\x9f" in said


def test_stream_equals_full_response(running) -> None:
    client, _, _ = running
    asked = {"prompt": ["a", "import"], "n": 2, "max_tokens": 9, "logprobs": 1, "echo": True}
    whole = client.post(URL, json=asked).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(URL, json={**asked, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = events(response)
    assert {frame["id"] for frame in frames} == {frames[0]["id"]}
    assert all(frame["usage"] is None for frame in frames[:-1])
    assert frames[-1]["choices"] == [] and frames[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [one for f in frames for one in f["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        reasons = [one["finish_reason"] for one in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for key, value in choice["logprobs"].items():
            assert [x for one in mine if one["logprobs"] for x in one["logprobs"][key]] == value


def test_stream_without_usage(running) -> None:
    client, _, _ = running
    frames = events(client.post(URL, json={"prompt": "a", "stream": True}))
    assert all("usage" not in frame for frame in frames)


def test_stop_text_ends_output(own_server, served) -> None:
    client, engine, _ = own_server
    engine.tokens = lambda prompt: ids_of(served, "one two three")
    for stop in ("two", ["zzz", "two"]):
        answer = client.post(URL, json={"prompt": "x", "stop": stop}).json()
        assert answer["choices"][0]["text"] == "one "
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_parameters_reach_engine(running) -> None:
    client, engine, _ = running
    asked = {
        "prompt": [5], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11, "max_tokens": 3,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["a", "b"],
        "stop_token_ids": [9], "ignore_eos": True, "min_p": 0.1, "repetition_penalty": 1.2,
        "logit_bias": {"7": 100, "8": -2.5, "9": 0},
    }  # fmt: skip
    assert client.post(URL, json=asked).status_code == 200
    (_, got) = engine.submitted[0]
    assert (got.temperature, got.top_p, got.top_k, got.seed) == (0.5, 0.9, 7, 11)
    assert (got.presence_penalty, got.frequency_penalty) == (0.5, -0.5)
    assert (got.min_p, got.repetition_penalty) == (0.1, 1.2)
    assert got.logit_bias == ((7, 100), (8, -2.5))
    assert (got.stop, got.stop_ids, got.ignore_eos) == (("a", "b"), frozenset({9}), True)
    assert (got.max_tokens, got.logprobs, got.prompt_logprobs) == (3, None, None)


def test_neutral_parameters_are_accepted(running) -> None:
    client, _, _ = running
    asked = {
        "model": "reference", "prompt": "a", "best_of": 1, "n": 1, "logit_bias": {}, "suffix": None,
        "user": "me", "echo": False, "stop": None, "seed": None, "logprobs": None, "stream": False,
        "temperature": None, "top_p": None, "max_tokens": None, "stream_options": None,
    }  # fmt: skip
    assert client.post(URL, json=asked).status_code == 200


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.0}, {"min_p": 0}, {"min_p": 0.0}, {"top_k": -1}, {"top_k": 0},
        {"logit_bias": None}, {"logit_bias": {"5": 0}}, {"suffix": ""}, {"best_of": 1},
        {"frequency_penalty": 0, "presence_penalty": 0}, {"store": True}, {"store": False},
        {"metadata": {"trace": {"id": [1, None]}}}, {"metadata": {}}, {"service_tier": "flex"},
        {"stream_options": {"include_usage": False}}, {"stream_options": {}}, {"user": ""},
        {"something_new": None}, {"min_tokens": 0}, {"use_beam_search": False},
        {"length_penalty": 1.0}, {"typical_p": 1.0}, {"skip_special_tokens": True},
        {"response_format": {"type": "text"}}, {"repeat_penalty": 1.0}, {"mirostat": 0},
        {"add_special_tokens": True}, {"stop": []}, {"seed": 1},
    ],
)  # fmt: skip
def test_neutral_values_are_accepted(running, asked) -> None:
    client, engine, _ = running
    plain = {"prompt": [5], "max_tokens": 3, "seed": 1}
    assert client.post(URL, json={**plain, **asked}).status_code == 200, asked
    assert client.post(URL, json=plain).status_code == 200
    (_, got), (_, usual) = engine.submitted
    assert got == usual


def test_top_p_zero_is_greedy(running) -> None:
    client, engine, _ = running
    assert client.post(URL, json={"prompt": [5], "top_p": 0}).status_code == 200
    assert Sampler(engine.submitted[0][1]).plain


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty", "0.01"),
        ({"repetition_penalty": -1.0}, "repetition_penalty", "0.01"),
        ({"repetition_penalty": "1"}, "repetition_penalty", "number"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "token 5"),
        ({"logit_bias": {"5": 10**400}}, "logit_bias", "token 5"),
        ({"logit_bias": {"5": None}}, "logit_bias", "token 5"),
        ({"logit_bias": {"5": True}}, "logit_bias", "token 5"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "'five' is not a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias", "token 9999999 does not exist"),
        ({"logit_bias": {str(n): "x" for n in range(100_000)}}, "logit_bias", "token 0"),
        ({"logit_bias": [5]}, "logit_bias", "dictionary"),
        ({"stop_token_ids": [9999999]}, "stop_token_ids", "token 9999999 does not exist"),
        ({"min_tokens": 3}, "min_tokens", "unsupported"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported"),
        ({"length_penalty": True}, "length_penalty", "unsupported"),
        ({"store": "yes"}, "store", "boolean"),
    ],
)
def test_invalid_value_names_parameter(running, asked, param, says) -> None:
    client, engine, _ = running
    error = error_of(client.post(URL, json={"prompt": "a", **asked}), 400)
    assert error["param"] == param and says in error["message"] and param in error["message"]
    assert not engine.submitted


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": ["a"] * 9}, "n"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({}, "prompt"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop"),
    ],
)
def test_unsupported_parameters_raise(running, asked, param) -> None:
    client, engine, _ = running
    error = error_of(client.post(URL, json=asked), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not engine.submitted


@pytest.mark.parametrize("asked", [{"suffix": "b"}, {"new": 1}])
def test_unsupported_parameter_is_named(running, asked) -> None:
    client, _, _ = running
    error = error_of(client.post(URL, json={"prompt": "a", **asked}), 400)
    assert error["code"] == "unsupported_parameter"
    assert f"unsupported parameter '{next(iter(asked))}'" in error["message"]


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("application/x-www-form-urlencoded", b'{"prompt": "a"}', "Content-Type: application/json"),
        ("text/plain", b'{"prompt": "a"}', "Content-Type: application/json"),
        ("application/json", b"", "the body is missing"),
        ("application/json", b'"text"', "the body is invalid"),
    ],
)
def test_wrong_body_names_expected_endpoint(running, kind, body, says) -> None:
    """The first case is what curl sends with -d only."""
    client, _, _ = running
    response = client.post(URL, content=body, headers={"Content-Type": kind})
    assert says in error_of(response, 400)["message"]


def test_unknown_tokens_raise(running) -> None:
    client, _, _ = running
    for asked in ({"prompt": [4096]}, {"prompt": "a", "stop_token_ids": [99999]}):
        assert "4095" in error_of(client.post(URL, json=asked), 400)["message"]


def test_unknown_model_is_404(running) -> None:
    client, _, _ = running
    error = error_of(client.post(URL, json={"model": "gpt-4", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


def test_too_large_request_names_sizes(running) -> None:
    client, _, _ = running
    error = error_of(client.post(URL, json={"prompt": "a", "max_tokens": 600}), 400)
    assert error["code"] == "context_length_exceeded" and "512" in error["message"]
    long = error_of(client.post(URL, json={"prompt": "a" * 1_000_000}), 400)
    assert long["code"] == "context_length_exceeded"


def test_too_many_logprobs_raise(served) -> None:
    with fake_service(served, logprobs=200) as (service, engine), client_of(service) as client:
        asked = {"prompt": [3] * 20, "max_tokens": 10, "logprobs": 4}
        assert client.post(URL, json={**asked, "n": 4}).status_code == 200
        assert client.post(URL, json={**asked, "echo": True}).status_code == 200
        for more in ({"n": 5}, {"n": 2, "echo": True}, {"max_tokens": 2**31 - 1}):
            error = error_of(client.post(URL, json={**asked, **more}), 400)
            assert (error["param"], error["code"]) == ("logprobs", "too_many_logprobs")
        assert len(engine.submitted) == 5
        plain = {"prompt": [3] * 20, "max_tokens": 300}
        assert client.post(URL, json=plain).status_code == 200


def test_failed_choice_cancels_others(own_server) -> None:
    client, engine, _ = own_server
    error_of(client.post(URL, json={"prompt": [[5], [5] * 500], "max_tokens": 50}), 400)
    assert len(engine.submitted) == 1 and engine.cancelled == ["request-0"]


def test_full_queue_is_retryable(own_server) -> None:
    client, engine, _ = own_server
    engine.full = True
    response = client.post(URL, json={"prompt": "a"})
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"


def test_model_failure_is_reported(own_server) -> None:
    client, engine, _ = own_server
    engine.fail[(5, 6)] = "OSError: Input/output error: '/home/her/models/shard-1.safetensors'"
    error = error_of(client.post(URL, json={"prompt": [5, 6]}), 500)
    assert error["code"] == "failed" and error["type"] == "server_error"
    assert "home" not in error["message"], "no path of ours"
    response = client.post(URL, json={"prompt": [5, 6], "stream": True})
    frames = events(response)
    assert response.status_code == 200
    assert frames[-1]["error"]["code"] == "failed"
    assert "home" not in frames[-1]["error"]["message"]
    assert not engine.cancelled


def test_stream_errors_are_events(own_server, monkeypatch) -> None:
    client, _, service = own_server
    asked_for: list[int] = []

    def name(token: int) -> str:
        asked_for.append(token)
        if len(set(asked_for)) > 1:
            raise KeyError(token)
        return "one"

    monkeypatch.setattr(service.tokenizer, "name", name)
    asked = {"prompt": "a", "logprobs": 0, "stream": True}
    *frames, last = events(client.post(URL, json=asked))
    assert [one["choices"][0]["logprobs"]["tokens"] for one in frames] == [["one"]]
    assert last["error"]["type"] == "server_error" and "log" in last["error"]["message"]


def test_shutdown_rejects_requests(own_server) -> None:
    client, _, service = own_server
    service.draining = True
    assert error_of(client.post(URL, json={"prompt": "a"}), 503)["code"] == "shutting_down"
    assert client.get("/health").status_code == 503
