"""A model served through the host cache, on a CPU and, if there is one, on a GPU."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import slow_but
from serving import differs_by
from tiny_served import (
    FAMILIES,
    Disk,
    logits,
    model_of,
    reading_through,
    saved,
    settled,
    tiny,
    tokens,
    with_slots,
)

from moefit.errors import CheckpointError, ConfigError, DeviceError
from moefit.serve import load
from moefit.serve.config import LoadSettings
from moefit.serve.io.loads import BACKGROUND_READERS
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@contextmanager
def serving(
    folder: Path, monkeypatch, *, slots: int, places: int, disk: Disk | None = None, **how: Any
):
    """Serve on a CPU with a host cache for `experts`, as on a GPU."""
    own = load.memory_budget

    def with_host(*given: Any) -> Any:
        budget = own(*given)
        return replace(budget, host=places * max(block.slot_bytes for block in budget.blocks))

    monkeypatch.setattr(load, "memory_budget", with_host)
    with (
        reading_through(disk or Disk()),
        load_model(folder, LoadSettings(context=64, **how)) as served,
    ):
        served.set_memory(with_slots(served, slots))
        yield served
        served.check()
    assert served.report()["host_bytes"] == 0, "closing gives all back"


def generated(one: Any, device: str = "cpu") -> list[int]:
    ids_BT = tokens(1, 9).to(device)
    return one.generate(ids_BT, max_new_tokens=12, do_sample=False)[0].tolist()


@pytest.mark.parametrize("places", [1, 5, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_model_with_any_host_memory(
    folders, monkeypatch, family: str, places: int
) -> None:
    with serving(folders(family), monkeypatch, slots=2, places=places) as served:
        assert (
            differs_by(logits(served.model, tokens(2, 7)), logits(model_of(family), tokens(2, 7)))
            < 1e-4
        )
        assert generated(served) == generated(model_of(family))
        report = served.report()
        assert report["host_bytes"] <= report["host_budget"] == served.budget.host
        assert report["host_hits"] + report["host_reads"] == report["fetches"]


def test_host_memory_for_all_reads_each_once(folders, monkeypatch) -> None:
    with serving(folders("Olmoe"), monkeypatch, slots=1, places=16) as served:
        for _ in range(3):
            generated(served)
        report = served.report()
        used = [
            one.block.expert_bytes * sum(count > 0 for count in one.use_counts[: one.num_experts])
            for one in served.blocks.values()
        ]
        assert report["bytes_read"] == sum(used)
        assert report["host_hits"] > 10 * report["host_reads"]


def test_modes_and_budgets_change(folders, monkeypatch) -> None:
    with serving(folders("Mixtral"), monkeypatch, slots=3, places=4) as served:
        for mode, slots in [("virtual", 2), ("bounded", 5), ("virtual", 8), ("exact", 1)]:
            served.set_mode(mode)
            served.set_memory(with_slots(served, slots))
            generated(served)
            settled(served)
            served.check()
        assert generated(served) == generated(model_of("Mixtral"))
        served.set_residents({name: [5] for name in served.blocks})
        assert all(one == [5] for one in served.report()["resident"].values())


def test_failed_fetch_raises_and_next_generation_works(folders, monkeypatch) -> None:
    disk = Disk()
    with serving(folders("Mixtral"), monkeypatch, slots=1, places=3, disk=disk) as served:
        disk.failures = 10**6
        with pytest.raises(CheckpointError, match="cannot be read after 3 attempts"):
            generated(served)
        served.check()
        disk.failures = 0
        assert generated(served) == generated(model_of("Mixtral"))


def test_every_precision_uses_host_cache(folders, monkeypatch) -> None:
    with load_model(folders("Mixtral"), LoadSettings(context=64, precision="int4")) as served:
        expected = generated(served)
    with serving(folders("Mixtral"), monkeypatch, slots=2, places=3, precision="int4") as served:
        assert generated(served) == expected
    auto = {"precision": "auto", "memory": "8GiB"}
    with serving(folders("Mixtral"), monkeypatch, slots=8, places=9, **auto) as served:
        generated(served)
        served.set_memory("8GiB")
        for _ in range(3):
            generated(served)
            served.check()
        assert served.report()["host_reads"] > 16, "experts came again, in other formats"


def test_cpu_has_no_host_cache(folders) -> None:
    with load_model(folders("Mixtral"), LoadSettings(context=64)) as served:
        assert not [key for key in served.report() if key.startswith("host_")]
        assert served.report()["budget"]["host"] is None


@pytest.mark.parametrize("precision", ["native", "int4"])
@pytest.mark.parametrize("family", slow_but(["GptOss"], FAMILIES))
def test_misses_computed_in_host_memory_equal_the_model(
    folders, monkeypatch, family: str, precision: str
) -> None:
    """On a stand-in both sides have the same kernels, so tokens and logits are the same bits.

    gpt-oss's are not on every processor: torch computes its activation, and its experts in the
    model's dtype, with roundings that depend on how many tokens an expert has.
    """
    rounding = 1e-5 if family == "GptOss" else 0.0
    with load_model(folders(family), LoadSettings(context=64, precision=precision)) as served:
        expected, made = logits(served.model, tokens(2, 7)), generated(served)
    how = {"slots": 2, "places": 100, "precision": precision}
    with serving(folders(family), monkeypatch, **how) as served:
        generated(served)  # fills host memory
        for rule in ("compute-all", "balanced", "auto"):
            served.start_host_side(rule)
            assert served.report()["hybrid"]["obstacle"] == ""
            found = logits(served.model, tokens(2, 7))
            assert torch.allclose(found, expected, rtol=rounding, atol=rounding)
            assert generated(served) == made
            served.check()
            if rule == "compute-all":
                assert served.report()["computed_on_host"] > 0
        fetches, there = served.report()["fetches"], served.report()["computed_on_host"]
        served.make_deterministic()
        generated(served)
        assert served.report()["computed_on_host"] == there, "all misses are fetched from now on"
        assert served.report()["fetches"] > fetches
        assert "deterministic" in served.report()["hybrid"]["obstacle"]


def test_host_side_says_why_it_is_off(folders, monkeypatch) -> None:
    with load_model(folders("Mixtral"), LoadSettings(context=64)) as served:
        assert served.report()["hybrid"]["obstacle"] == "the model is not on a GPU"
        served.start_host_side("auto")
        assert "no host memory" in served.report()["hybrid"]["obstacle"]
    disk = Disk()
    with serving(folders("Mixtral"), monkeypatch, slots=1, places=3, disk=disk) as served:
        served.start_host_side("fetch-all")
        assert "as the setting says" in served.report()["hybrid"]["obstacle"]
        disk.failures = 10**6
        served.start_host_side("auto")
        assert "cannot be read" in served.report()["hybrid"]["obstacle"]
        disk.failures = 0
        assert generated(served) == generated(model_of("Mixtral"))


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ConfigError("no bandwidth"), DeviceError("gone")]
)
def test_only_a_rule_given_by_name_has_to_be_measured(folders, monkeypatch, error) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("moefit.serve.hybrid.start.measure_costs", fails)
    with serving(folders("Mixtral"), monkeypatch, slots=1, places=3) as served:
        served.start_host_side("auto")
        assert str(error) in served.report()["hybrid"]["obstacle"]
        assert generated(served) == generated(model_of("Mixtral"))
        with pytest.raises(type(error), match=str(error)):
            served.start_host_side("balanced")
        served.start_host_side("auto")
        served.check()


@pytest.mark.parametrize("step", ["load_dense_weights", "grow"])
def test_failed_load_releases_host_cache(folders, monkeypatch, step: str) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(load.HostCache, "close", lambda tier: closed.append(True))

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(load, step, fail)
    with (
        pytest.raises(MemoryError, match="no more"),
        serving(folders("Mixtral"), monkeypatch, slots=1, places=1),
    ):
        pass
    assert closed == [True]


@pytest.fixture
def on_gpu(folders) -> Iterator[Any]:
    opened: list[ServedModel] = []

    def make(family: str, **settings: Any) -> ServedModel:
        opened.append(
            load_model(folders(family), LoadSettings(context=64, device="cuda", **settings))
        )
        return opened[-1]

    yield make
    for served in opened:
        served.close()
    gc.collect()


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("host_memory", [None, "64KiB", "1GiB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_exact_equals_model_at_any_budget(on_gpu, family: str, host_memory: str | None) -> None:
    served = on_gpu(family, host_memory=host_memory)
    theirs = tiny(family).to("cuda")
    for slots in (1, 3, 8, 2):
        served.set_memory(with_slots(served, slots))
        ids_BT = tokens(2, 7).to("cuda")
        torch.testing.assert_close(
            logits(served.model, ids_BT), logits(theirs, ids_BT), rtol=1e-4, atol=1e-4
        )
        assert generated(served, "cuda") == generated(theirs, "cuda")
        served.check()
    report = served.report()
    assert report["host_pinned"] and report["host_bytes"] <= report["host_budget"]
    assert 0 < report["process_bytes"] <= report["peak_process_bytes"]
    slot = served.blocks[next(iter(served.blocks))].block_slot_bytes
    if host_memory is None:
        assert report["host_budget"] <= (4 + BACKGROUND_READERS) * 2 * slot


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("rule", ["auto", "compute-all", "balanced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_computes_misses_in_host_memory(on_gpu, family: str, rule: str) -> None:
    """Up to the rounding of two devices."""
    served = on_gpu(family, host_memory="1GiB", host_compute=rule)
    theirs = tiny(family).to("cuda")
    served.set_memory(with_slots(served, 2))
    for seed in range(3):
        ids_BT = tokens(2, 7, seed=seed).to("cuda")
        torch.testing.assert_close(
            logits(served.model, ids_BT), logits(theirs, ids_BT), rtol=1e-3, atol=1e-3
        )
    assert served.report()["hybrid"]["obstacle"] == ""
    if rule == "compute-all":
        assert served.report()["computed_on_host"] > 0
    served.check()


@pytest.mark.gpu
@no_gpu
def test_gpu_peak_stays_within_budget(tmp_path: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    own = tiny("Mixtral", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    saved(own, tmp_path)  # 32 experts of 12 MiB
    settings = LoadSettings(context=64, device="cuda", host_memory="100MiB")
    floor = load.memory_budget(load.build_skeleton(tmp_path), settings).min_bytes
    torch.cuda.reset_peak_memory_stats()
    with load_model(tmp_path, replace(settings, memory=floor + (150 << 20))) as served:
        generated(served, "cuda")
        assert served.report()["peak_process_bytes"] <= floor + (150 << 20)
        served.set_memory(floor + (10 << 20))
        torch.cuda.reset_peak_memory_stats()
        made, report = generated(served, "cuda"), served.report()
        assert report["peak_process_bytes"] <= floor + (10 << 20)
        assert report["host_hits"] > 0
        served.check()
    assert made == generated(own.to("cuda"), "cuda")
