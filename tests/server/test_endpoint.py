"""End to end: HTTP, engine and the reference model, against the model itself."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fastapi.testclient import TestClient
from serving_http import client_of, error_of, events

import moefit
from moefit.engine.engine import Engine
from moefit.serve.model import ServedModel
from moefit.server.middleware import ServerSettings
from moefit.server.service import Service

URL = "/v1/completions"
PROMPTS = ["import os\n", "def main():\n    ", "class A(object):", "for key, value in"]


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with moefit.load("reference", memory="4GiB", context=512) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[TestClient]:
    engine = Engine(served)
    engine.start()
    service = Service(engine, ServerSettings(name="reference"))
    with client_of(service) as client:
        yield client
    engine.close()
    service.close()
    engine.check()


@pytest.fixture(scope="module")
def expected(served: ServedModel) -> dict[str, str]:
    """Return the model's own greedy completions, one prompt at a time."""
    texts = {}
    for prompt in PROMPTS:
        given = served.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = served.generate(**given, max_new_tokens=12, do_sample=False)
        text = served.tokenizer.decode(ids[0, given["input_ids"].shape[1] :])
        texts[prompt] = str(text)
    return texts


def test_greedy_text_does_not_depend_on_batch(expected, client) -> None:
    asked = {"prompt": PROMPTS, "temperature": 0, "max_tokens": 12}
    answer = client.post(URL, json=asked).json()
    assert [choice["text"] for choice in answer["choices"]] == list(expected.values())
    frames = events(client.post(URL, json={**asked, "stream": True}))
    for index, text in enumerate(expected.values()):
        mine = [one for f in frames for one in f["choices"] if one["index"] == index]
        assert "".join(one["text"] for one in mine) == text


def test_echoed_logprobs_equal_model(served, client) -> None:
    ids = served.tokenizer("def add(a, b):\n    return a + b")["input_ids"]
    asked = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    (choice,) = client.post(URL, json=asked).json()["choices"]
    with torch.inference_mode():
        logits_1LV = served.model(input_ids=torch.tensor([ids])).logits
    logprobs_LV = logits_1LV[0].float().log_softmax(-1)
    own = [float(logprobs_LV[at, token]) for at, token in enumerate(ids[1:])]
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=0.03)
    best = logprobs_LV.argmax(-1).tolist()
    names = [served.tokenizer.decode([token]) for token in best[:-1]]
    likeliest = [max(top, key=top.__getitem__) for top in told["top_logprobs"][1 : len(ids)]]
    assert sum(a == b for a, b in zip(names, likeliest, strict=True)) >= len(names) - 1
    assert len(told["tokens"]) == len(ids) + 1


@contextmanager
def logits_changed(served: ServedModel, ids: list[int], value: float) -> Iterator[None]:
    """Replace the logits of some tokens, as heads that mask part of the vocabulary do."""
    at = torch.tensor(ids)
    hook = served.model.get_output_embeddings().register_forward_hook(
        lambda _head, _input, logits: logits.index_fill(-1, at, value)
    )
    try:
        yield
    finally:
        hook.remove()


def test_excluded_token_logprob_is_json(served, client) -> None:
    ids = served.tokenizer("import os, sys")["input_ids"]
    masked = [token for token in range(served.model.config.vocab_size) if token != ids[0]]
    asked = {"prompt": ids, "echo": True, "logprobs": 3, "max_tokens": 2, "temperature": 0}
    served.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    hello = [{"role": "user", "content": "hello"}]
    chat = {"messages": hello, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    try:
        with logits_changed(served, masked, -torch.inf):
            (choice,) = client.post(URL, json=asked).json()["choices"]
            frames = events(client.post(URL, json={**asked, "stream": True}))
            (said,) = client.post("/v1/chat/completions", json=chat).json()["choices"]
            pieces = events(client.post("/v1/chat/completions", json={**chat, "stream": True}))
    finally:
        served.tokenizer.chat_template = None
    told = choice["logprobs"]
    assert told["token_logprobs"][1 : len(ids)] == [-9999.0] * (len(ids) - 1)
    assert told["token_logprobs"][len(ids) :] == [0.0, 0.0]
    assert sorted(told["top_logprobs"][1].values())[-2:] == [-9999.0, 0.0]
    streamed = [f["choices"][0]["logprobs"] for f in frames if f["choices"][0]["logprobs"]]
    assert [x for one in streamed for x in one["token_logprobs"]] == told["token_logprobs"]
    for one in said["logprobs"]["content"]:
        assert [top["logprob"] for top in one["top_logprobs"]] == [0.0, -9999.0, -9999.0]
    streamed = [f["choices"][0]["logprobs"] for f in pieces if f["choices"][0]["logprobs"]]
    assert [x for one in streamed for x in one["content"]] == said["logprobs"]["content"]


def test_nan_model_gives_error(served, client) -> None:
    for asked in ({"max_tokens": 3}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
        with logits_changed(served, [0, 5], torch.nan):
            error = error_of(client.post(URL, json={"prompt": "import os", **asked}), 500)
        assert error["code"] == "failed"
        assert client.post(URL, json={"prompt": "import os", **asked}).status_code == 200


def test_seed_is_reproducible_and_choices_differ(client) -> None:
    asked = {"prompt": PROMPTS[1], "seed": 7, "n": 3, "max_tokens": 12}
    first, again = (client.post(URL, json=asked).json()["choices"] for _ in range(2))
    assert first == again
    assert len({choice["text"] for choice in first}) > 1


def test_memory_changes_during_responses(served, client, expected) -> None:
    memory = client.get("/v1/memory").json()
    less = memory["floor"] + (memory["everything"] - memory["floor"]) // 3
    texts: list[str] = []

    def ask() -> None:
        for prompt in PROMPTS:
            asked = {"prompt": prompt, "temperature": 0, "max_tokens": 12}
            texts.append(client.post(URL, json=asked).json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    changes = 0
    while thread.is_alive():
        budget = less if changes % 2 else "4GiB"
        assert client.post("/v1/memory", json={"bytes": budget}).status_code == 200
        changes += 1
    thread.join()
    assert texts == list(expected.values())
    assert changes > 2
    served.check()


def test_request_that_never_fits_names_sizes(client) -> None:
    error = error_of(client.post(URL, json={"prompt": "a", "max_tokens": 5000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "5,001" in error["message"] and "one request holds at most" in error["message"]
    fitting = int(re.search(r"max_tokens=([\d,]+) or less", error["message"])[1].replace(",", ""))
    assert 511 <= fitting < 5000, "at least what is reserved"
