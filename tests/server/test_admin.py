"""GET and POST /v1/memory, /metrics and informational endpoints."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from serving_http import client_of, error_of, fake_service

import moefit
from moefit.cli.budget import memory_table
from moefit.engine.invariance import Invariance, Uncovered
from moefit.errors import BudgetTooSmallError
from moefit.host import Processors
from moefit.quant.backend import backend_status
from moefit.serve.memory.follow import BudgetFollower, BudgetRule, MemoryReading
from moefit.serve.model import ServedModel
from moefit.serve.stats import RECOVERY, LoadFailures
from moefit.server import tokenizer
from moefit.server.metrics import ModelCollector
from moefit.server.service import Service
from moefit.server.tokenizer import Renderer

URL = "/v1/memory"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with moefit.load("reference", memory="4GiB") as served:
        prompt = served.tokenizer("import os", return_tensors="pt", return_token_type_ids=False)
        served.generate(**prompt, max_new_tokens=4)
        yield served


@pytest.fixture
def running(served: ServedModel) -> Iterator[tuple[TestClient, FakeEngine, Service]]:
    served.set_mode("exact")
    served.set_memory("4GiB")
    with fake_service(served) as (service, engine), client_of(service) as client:
        yield client, engine, service


def metrics_of(client: TestClient) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "reference"
            rest = [value for name, value in sample.labels.items() if name != "model_name"]
            found[" ".join([sample.name, *rest])] = sample.value
    return found


def test_memory_state(running, served) -> None:
    client, _, _ = running
    memory = client.get(URL).json()
    assert memory["model"] == "reference" and memory["mode"] == "exact"
    assert memory["budget"]["total"] == 4 << 30
    assert memory["floor"] == served.budget.min_bytes < memory["everything"]
    assert 0 < memory["slot_bytes"] < memory["process_bytes"] <= memory["peak_process_bytes"]
    assert memory["requests"] == {"running": 0, "waiting": 0}
    assert (memory["kv_tokens"], memory["kv_tokens_used"]) == (2048, 17)
    assert (memory["kv_tokens_reserved"], memory["kv_tokens_most"]) == (1024, 8192)
    assert "17 of 2,048, up to 8,192" in [str(one) for one in memory_table(memory).columns[1].cells]
    assert memory["kv_cache_dtype"] == served.budget.kv_dtype
    assert memory["latency"]["ttft_p50"] is None
    assert memory["counters"]["hits"] > 0
    report = served.report()
    assert memory["checkpoint"] == report["checkpoint"]
    assert memory["dense_from"] == "checkpoint"
    assert memory["checkpoint"]["experts"] and memory["checkpoint"]["expert_bytes"] > 0
    for block in memory["blocks"]:
        assert block["resident"] == report["resident"][block["name"]]
        assert len(block["formats"]) == len(block["importance"]) == block["experts"]
        resident = [e for e, format in enumerate(block["formats"]) if format is not None]
        assert resident == block["resident"]
        assert max(block["importance"]) == 1.0 and min(block["importance"]) >= 0.0


def test_memory_state_says_what_answers_depend_on(running) -> None:
    client, engine, _ = running
    covered = {"covered": True, "deterministic": False, "not_covered": []}
    assert client.get(URL).json()["invariance"] == covered
    one = Uncovered("model.layers.*.mamba", "a convolution computed by torch")
    engine.invariance = Invariance(not_covered=(one,), deterministic=True)
    assert client.get(URL).json()["invariance"] == {
        "covered": False,
        "deterministic": True,
        "not_covered": [{"module": one.module, "reason": one.reason}],
    }


def test_memory_state_says_what_computes(running, monkeypatch) -> None:
    client, engine, _ = running
    state = client.get(URL).json()["processor"]
    assert state["kernels"] == backend_status(engine.served.model.device)
    assert state["threads"] == torch.get_num_threads() and not state["kernels_note"]
    half = Processors(logical=4, cores=2, quota=0.5, file=Path("cpu.max"))
    monkeypatch.setattr("moefit.server.operation.memory_state.processors", lambda: half)
    state = client.get(URL).json()["processor"]
    assert (state["logical"], state["cores"], state["quota"]) == (4, 2, 0.5)
    assert state["threads_reason"] == half.describe(state["threads"])


def test_memory_change_resizes_slots(running, served) -> None:
    client, _, _ = running
    before = client.get(URL).json()
    less = (before["floor"] + before["everything"]) // 2
    after = client.post(URL, json={"bytes": less, "mode": "virtual"}).json()
    assert after["budget"]["total"] == less and after["mode"] == "virtual"
    assert after["prefill"] == "virtual"
    assert sum(b["slots"] for b in after["blocks"]) < sum(b["slots"] for b in before["blocks"])
    assert after["slot_bytes"] < before["slot_bytes"]
    assert after["counters"]["budget_changes"] == {"ok": 1}
    assert client.get(URL).json()["budget"] == after["budget"]
    words = client.post(URL, json={"bytes": "3.5GiB"}).json()
    assert words["budget"]["total"] == 3.5 * 2**30 and words["mode"] == "virtual"
    none = client.post(URL, json={"bytes": None}).json()
    assert none["budget"]["total"] is None
    bounded = client.post(URL, json={"mode": "bounded", "bound": 0.1}).json()
    assert (bounded["mode"], bounded["prefill"], bounded["bound"]) == ("bounded", "exact", 0.1)
    assert bounded["budget"]["total"] is None
    assert client.post(URL, json={"bound": 0.2}).json()["mode"] == "bounded"
    served.check()


def test_budget_below_minimum_changes_nothing(running) -> None:
    client, _, service = running
    before = client.get(URL).json()
    error = error_of(client.post(URL, json={"bytes": "100MiB", "mode": "virtual"}), 400)
    assert error["code"] == "budget_too_small" and str(before["floor"]) in error["message"]
    after = client.get(URL).json()
    assert (after["budget"], after["mode"]) == (before["budget"], "exact")
    assert service.telemetry.changes == {"refused": 1}


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"bytes": "much"}, {"bytes": 0}, {"bytes": -5}, {"bytes": 1.5}, {"bytes": True},
        {"bytes": ""}, {"mode": "fast"}, {"bound": 2}, {"memory": "4GiB"}, {"bytes": []},
    ],
)  # fmt: skip
def test_invalid_requests_raise(running, asked) -> None:
    client, _, _ = running
    error_of(client.post(URL, json=asked), 400)


def test_allocation_failure_is_reported_and_counted(running, served, monkeypatch) -> None:
    client, _, service = running
    before = client.get(URL).json()

    def fail(memory: object) -> None:
        raise OSError("cannot allocate")

    monkeypatch.setattr(served, "set_memory", fail)
    error_of(client.post(URL, json={"bytes": "3GiB", "mode": "bounded", "bound": 0.7}), 503)
    after = client.get(URL).json()
    for name in ("budget", "mode", "prefill", "bound"):
        assert after[name] == before[name], "either both happen or neither"
    assert service.telemetry.changes == {"failed": 1}
    assert metrics_of(client)["moefit:budget_changes_total failed"] == 1


@pytest.mark.parametrize(
    "asked", [{"bytes": "100MiB", "mode": "virtual"}, {"bytes": "3GiB", "mode": "bounded"}]
)
def test_failed_change_is_atomic(running, served, monkeypatch, asked) -> None:
    """The first request fails at its budget; the second at its mode, in a family without a rule."""
    client, engine, _ = running
    client.post(URL, json={"mode": "virtual", "prefill": "exact", "bound": 0.4})
    before, policy = client.get(URL).json(), served.policy
    if asked["mode"] == "bounded":
        for experts in served.blocks.values():
            monkeypatch.setattr(experts, "scoring", None)
    commands: list[object] = []
    between_steps = engine.between_steps
    monkeypatch.setattr(
        engine, "between_steps", lambda change: commands.append(change) or between_steps(change)
    )
    error_of(client.post(URL, json=asked), 400)
    assert len(commands) == 1, "nothing can come between the two"
    assert served.policy == policy
    assert client.get(URL).json()["budget"] == before["budget"]
    served.check()


def test_budget_and_mode_change_together(running, served) -> None:
    client, engine, service = running
    commands: list[object] = []
    between_steps = engine.between_steps
    engine.between_steps = lambda change: commands.append(change) or between_steps(change)
    memory = client.post(URL, json={"bytes": "3GiB", "mode": "bounded", "bound": 0.1}).json()
    assert (memory["budget"]["total"], memory["mode"], memory["bound"]) == (3 << 30, "bounded", 0.1)
    assert len(commands) == 1
    assert service.telemetry.changes == {"ok": 1}


def test_budget_follows_free_memory_until_one_is_set(running, served, monkeypatch) -> None:
    client, _, service = running
    assert client.get(URL).json()["following"] is None
    refused = client.post(URL, json={"bytes": "auto"})
    assert "cannot follow free memory" in error_of(refused, 400)["message"]
    floor, free = client.get(URL).json()["floor"], 3 << 30
    service.follower = BudgetFollower(
        BudgetRule(least=floor, most=8 << 30, headroom=1 << 30),
        lambda: served.budget.total or served.budget.max_bytes,
        served.set_memory,
        read=lambda: MemoryReading(process=1 << 30, available=free),
    )
    memory = client.post(URL, json={"bytes": "auto", "mode": "virtual"}).json()
    assert memory["following"] == {
        "active": True, "least": floor, "most": 8 << 30, "headroom": 1 << 30,
    }  # fmt: skip
    assert 2.8 * (1 << 30) < memory["budget"]["total"] < 3 << 30
    assert memory["mode"] == "virtual"
    monkeypatch.setattr(service.follower, "_apply", Mock(side_effect=BudgetTooSmallError("no")))
    assert client.post(URL, json={"bytes": "4GiB"}).status_code == 200
    error_of(client.post(URL, json={"bytes": "auto", "mode": "exact"}), 400)
    memory = client.get(URL).json()
    assert memory["mode"] == "virtual" and not memory["following"]["active"], "nothing changed"
    memory = client.post(URL, json={"bytes": "4GiB"}).json()
    assert not memory["following"]["active"] and memory["budget"]["total"] == 4 << 30
    service.follower.close()


def test_slots_are_counted_by_format() -> None:
    """Slots with the checkpoint's codes have their name, which may differ between blocks."""
    collector = ModelCollector("tiny", stats=cast(Any, None), report=dict)
    formats = {"a": {"native": 2, "int4": 1}, "b": {"native": 3}}
    for held_in, expected in (
        ({"a": ["mxfp4"], "b": ["mxfp4"]}, {"mxfp4": 5, "int4": 1}),
        ({"a": ["q4_0"]}, {"q4_0": 2, "native": 3, "int4": 1}),
        ({"b": ["int4"]}, {"native": 2, "int4": 4}),
        ({}, {"native": 5, "int4": 1}),
    ):
        stored = {"held_in": held_in}
        report = {"formats": formats, "checkpoint": stored, "resident": {}, "slots": {}}
        *_, family = collector.blocks(report)
        found = {sample.labels["format"]: sample.value for sample in family.samples}
        assert found == expected and len(family.samples) == len(expected)


def test_metrics_have_vllm_names(running, served) -> None:
    client, _, _ = running
    client.post("/v1/completions", json={"prompt": "import os", "max_tokens": 5})
    client.post(URL, json={"bytes": "3GiB"})
    found, report = metrics_of(client), served.report()
    assert found["moefit:num_requests_running"] == 0
    assert found["moefit:num_requests_waiting"] == 0
    assert found["moefit:kv_cache_usage_perc"] == pytest.approx(17 / 2048)
    assert found["moefit:kv_cache_tokens"] == 2048
    assert found["moefit:kv_cache_max_tokens"] == 8192
    assert found["moefit:prompt_tokens_total"] == 5
    assert found["moefit:generation_tokens_total"] == 7
    assert found["moefit:prefix_cache_queries_total"] == 1000
    assert found["moefit:prefix_cache_hits_total"] == 750
    assert found["moefit:prefix_cache_evictions_total"] == 64
    assert found["moefit:prefix_cache_tokens"] == 192
    assert found["moefit:prefix_cache_disk_bytes"] == 300
    assert found["moefit:prefix_cache_disk_read_tokens_total"] == 64
    assert found["moefit:prefix_cache_disk_written_tokens_total"] == 192
    state = client.get(URL).json()["prefix_cache"]
    assert state["active"] and state["hits"] == 750 and state["disk"]["written"] == 192
    assert state["bytes"] == report["budget"]["kv_cache"] * 160 // 2048
    assert found["moefit:spec_decode_num_drafts_total"] == 10
    assert found["moefit:spec_decode_num_draft_tokens_total"] == 40
    assert found["moefit:spec_decode_num_accepted_tokens_total"] == 30
    assert found["moefit:spec_decode_num_accepted_tokens_per_pos_total 1"] == 9
    assert found["moefit:spec_decode_num_plain_steps_total"] == 2
    assert client.get(URL).json()["speculation"] == {
        "active": True, "reason": "by ngram", "drafts": 10, "drafted": 40, "accepted": 30,
        "plain_steps": 2,
    }  # fmt: skip
    assert found["moefit:request_success_total length"] == 1
    assert found["moefit:time_to_first_token_seconds_count"] == 1
    assert found["moefit:inter_token_latency_seconds_count"] == 4
    assert found["moefit:e2e_request_latency_seconds_count"] == 1
    assert found["moefit:request_queue_time_seconds_count"] == 1
    assert found["moefit:request_queue_time_seconds_sum"] == 0
    assert found["moefit:request_prefill_time_seconds_count"] == 1
    assert found["moefit:request_decode_time_seconds_count"] == 1
    assert found["moefit:request_inference_time_seconds_count"] == 1
    assert found["moefit:expert_budget_bytes"] == 3 << 30
    assert found["moefit:expert_resident_bytes"] == report["slot_bytes"]
    assert found["moefit:expert_requests_total hit"] == report["hits"] > 0
    assert found["moefit:expert_requests_total fetch"] == report["fetches"]
    assert found["moefit:expert_requests_total substitute"] == report["substitutions"]
    assert found["moefit:expert_bytes_loaded_total storage"] == report["bytes_read"] > 0
    assert found["moefit:expert_swaps_total importance"] == report["swaps"]
    assert found["moefit:expert_load_seconds_count"] == report["loads"] > 0
    assert found["moefit:expert_load_seconds_sum"] == report["load_seconds"] > 0
    assert found["moefit:expert_substituted_mass_count"] == report["routed"]
    assert found["moefit:budget_changes_total ok"] == 1
    for name, resident in report["resident"].items():
        assert found[f"moefit:expert_resident {name}"] == len(resident)


def test_queue_time_is_not_prefill_time(running) -> None:
    client, engine, _ = running
    engine.waits = 1e9  # more than it can have been: all of the time was waiting
    client.post("/v1/completions", json={"prompt": "import os", "max_tokens": 5})
    found = metrics_of(client)
    assert found["moefit:request_queue_time_seconds_sum"] == 1e9
    assert found["moefit:request_prefill_time_seconds_sum"] == 0
    whole = found["moefit:e2e_request_latency_seconds_sum"]
    assert 0 < found["moefit:request_inference_time_seconds_sum"] <= whole


def test_recent_latency(running) -> None:
    client, _, _ = running
    client.post("/v1/completions", json={"prompt": "import os", "max_tokens": 5})
    latency = client.get(URL).json()["latency"]
    assert 0 < latency["ttft_p50"] <= latency["ttft_p99"]
    assert 0 < latency["itl_p50"] <= latency["itl_p99"]


def test_server_info(running) -> None:
    client, _, _ = running
    (card,) = client.get("/v1/models").json()["data"]
    assert card == client.get("/v1/models/reference").json()
    assert (card["id"], card["object"], card["max_model_len"]) == ("reference", "model", 512)
    assert client.get("/version").json() == {"version": moefit.__version__}
    assert client.get("/health").json() == {"status": "ok"}


def test_tokenize_round_trips(running, served) -> None:
    client, _, _ = running
    text = "import os  # 😀"
    answer = client.post("/tokenize", json={"prompt": text}).json()
    assert answer["tokens"] == served.tokenizer(text)["input_ids"]
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    error_of(client.post("/detokenize", json={"tokens": [5000]}), 400)
    error_of(client.post("/tokenize", json={}), 400)
    messages = [{"role": "user", "content": "a"}]
    no_template = error_of(client.post("/tokenize", json={"messages": messages}), 400)
    assert no_template["code"] == "no_chat_template"


def test_tokenizer_info_for_lm_eval(running, served) -> None:
    """Requests as lm-evaluation-harness sends them with tokenizer_backend=remote."""
    client, _, _ = running
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == served.tokenizer.eos_token
    assert (info["chat_template"], info["vocab_size"]) == (None, 4096)
    assert info["tokenizer_class"] == type(served.tokenizer).__name__
    asked = {"prompt": info["eos_token"], "add_special_tokens": False}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert tokens == [served.tokenizer.eos_token_id]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == asked["prompt"]
    served.tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        assert client.get("/tokenizer_info").json()["chat_template"] == "{{ messages[0].content }}"
    finally:
        served.tokenizer.chat_template = None


def test_looping_templates_do_not_block_admin(running, served, monkeypatch) -> None:
    client, _, _ = running
    monkeypatch.setattr(tokenizer, "Renderer", partial(Renderer, seconds=3.0))
    again = "{% for i in range(99999) %}"
    served.tokenizer.chat_template = f"{again * 3}{'{% endfor %}' * 3}"
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    heard: list[Any] = []
    try:
        asks = [
            Thread(target=lambda: heard.append(client.post("/v1/chat/completions", json=chat)))
            for _ in range(3)
        ]
        for ask in asks:
            ask.start()
        began = monotonic()
        for path in (URL, "/metrics", "/health", "/version"):
            assert client.get(path).status_code == 200
        assert monotonic() - began < 2.0 and not heard
        for ask in asks:
            ask.join()
    finally:
        served.tokenizer.chat_template = None
    for response in heard:
        assert "did not end within 3 seconds" in error_of(response, 400)["message"]


def test_failing_disk_is_reported_in_virtual_mode(running, served, monkeypatch, caplog) -> None:
    """Background swaps fail while no request waits for them; the failure is still reported."""
    client, _, service = running
    half = (served.budget.min_bytes + served.budget.all_resident_bytes) // 2
    served.set_memory(half)
    served.set_mode("virtual", residency="manager")
    failures = LoadFailures()
    monkeypatch.setattr(served._shared.transfer, "failures", failures)
    prompt = served.tokenizer("class A:\n" * 9, return_tensors="pt", return_token_type_ids=False)
    for experts in served.blocks.values():
        experts.set_residents(
            range(experts.slot_table.num_slots)
        )  # an empty slot would be filled on demand
    with monkeypatch.context() as patch:
        patch.setattr(type(served._store), "read", _no_disk)
        for _ in range(20):
            served.generate(**prompt, max_new_tokens=24, do_sample=True)
            if failures.background:
                break
        health = client.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        assert "cannot be read" in health.json()["problems"][0]
        assert "/srv" not in health.text and "/srv/model: Input/output error" in caplog.text
    picture, found = client.get(URL).json(), metrics_of(client)
    assert picture["problems"] == health.json()["problems"]
    assert picture["counters"]["load_failures"] == served.report()["load_failures"]
    background = picture["counters"]["load_failures"]["background"]
    assert found["moefit:expert_load_failures_total background"] == background > 0
    assert found["moefit:expert_loads_failing"] == 1
    failures._clock = lambda: time.monotonic() + RECOVERY  # a minute later
    served.set_memory("4GiB")  # reads what is missing
    served._settle()
    assert client.get("/health").json() == {"status": "ok"}
    assert metrics_of(client)["moefit:expert_loads_failing"] == 0
    assert service.problems() == []


def test_failing_disk_makes_server_unhealthy(running, served, monkeypatch):
    client, _, service = running
    monkeypatch.setattr(served._shared.transfer, "failures", LoadFailures())
    monkeypatch.setattr(service.engine, "steps_fail", True)
    assert client.get("/health").json() == {"status": "ok"}, "other failures are the requests' own"
    served._shared.transfer.failures.failed("block", 0, OSError("gone"), background=False)
    said = error_of(client.get("/health"), 503)
    assert said["code"] == "storage_failed" and "cannot be read" in said["message"]
    monkeypatch.setattr(service.engine, "steps_fail", False)
    assert client.get("/health").json()["status"] == "degraded"


def _no_disk(*_: object) -> None:
    raise OSError("/srv/model: Input/output error")
