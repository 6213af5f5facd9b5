"""`--precision auto` over a tiny model: bytes, formats and outputs."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import VOCABULARY, saved, tiny

import moefit
from moefit.errors import CheckpointError, ConfigError
from moefit.moe.families import TensorSpec
from moefit.quant.error_model import GAUSSIAN
from moefit.quant.format import FORMATS
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.estimate import initial_formats, memory_budget
from moefit.serve.packed.store import open_packed
from moefit.serve.precision.allocate import AUTO_FORMATS

# Whole groups, and so many that a step up costs less than an expert at the smallest format.
WIDE = {"hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tiny("Mixtral", dtype=torch.bfloat16, **WIDE), tmp_path_factory.mktemp("auto"))


@pytest.fixture(scope="module")
def loaded(folder):
    with moefit.load(folder, precision="auto", memory="4GiB", context=64) as served:
        yield served


@pytest.fixture
def served(loaded):
    """Make all experts resident at native precision."""
    loaded.set_mode("exact")
    loaded.set_memory("4GiB")
    loaded.set_residents({name: range(one.num_experts) for name, one in loaded.blocks.items()})
    loaded.settle_precision()
    return loaded


def ids(seed: int, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (1, length), generator=generator)


def formats(served) -> Counter:
    return sum((Counter(one) for one in served.report()["formats"].values()), Counter())


def bytes_for(served, **counts: int) -> int:
    """Return the budget for these numbers of experts by format."""
    specs = next(iter(served.blocks.values())).block.layout.specs
    return served.budget.fixed + sum(
        count * FORMATS[name].nbytes(specs) for name, count in counts.items()
    )


def test_formats_for_budget_are_estimated(folder) -> None:
    skeleton, how = (
        build_skeleton(folder),
        LoadSettings(precision="auto", memory="4GiB", context=64),
    )
    plenty, packed = memory_budget(skeleton, how), open_packed(skeleton, how.formats())
    specs = skeleton.blocks[0].layout.specs
    sizes = {name: FORMATS[name].nbytes(specs) for name in ("int2", "int3", "native")}
    total = plenty.all_resident_bytes + 3 * (sizes["int3"] - sizes["int2"])
    some = initial_formats(skeleton, how, plenty.with_total(total), packed)
    assert some.formats == {"int3": 3, "int2": 13}
    assert some.nbytes == total - plenty.fixed
    assert some.bits_per_weight == 8 * some.nbytes / (16 * 3 * 128 * 128)
    few = initial_formats(
        skeleton, how, plenty.with_total(plenty.all_resident_bytes - sizes["int2"]), packed
    )
    assert few.formats == {"int2": 15}
    assert initial_formats(skeleton, how, plenty, packed).formats == {"native": 16}


def test_loading_reports_progress(folder) -> None:
    heard: list[tuple[str, int, int]] = []
    how = {"precision": "auto", "memory": "4GiB", "dense_precision": "int8", "context": 64}
    with moefit.load(folder, progress=lambda *one: heard.append(one), **how):
        experts = [one for one in heard if one[0] == "experts"]
        assert experts == sorted(experts) and experts[-1] == ("experts", 16, 16)
        assert 1 < len(set(experts)) == len(experts)
        rest = [one for one in heard if one[0] == "dense weights"]
        assert [done for _, done, _ in rest] == list(range(1, rest[-1][2] + 1))


def test_enough_memory_gives_native_output(served, folder) -> None:
    assert formats(served) == {"native": 16}
    with moefit.load(folder) as exact, torch.inference_mode():
        expected = exact.model(ids(1)).logits
        assert torch.equal(served.model(ids(1)).logits, expected)


def test_all_experts_are_resident_between_two_formats(served) -> None:
    served.set_memory(bytes_for(served, int4=10, int2=6))
    served.settle_precision()
    served.check()
    found = formats(served)
    assert sum(found.values()) == 16
    assert len(found) > 1
    before = served.report()["fetches"]
    with torch.inference_mode():
        served.model(ids(2))
    assert served.report()["fetches"] == before


def test_budget_holds_after_any_change(served) -> None:
    with torch.inference_mode():
        for step, count in enumerate((16, 3, 12, 16, 2, 9, 16)):
            served.set_memory(bytes_for(served, int3=count))
            served.check()
            served.model(ids(step))
            served.check()
            assert sum(formats(served).values()) <= 16


def test_hot_experts_are_upgraded_and_cold_ones_downgraded(served) -> None:
    served.set_memory(bytes_for(served, int4=16))
    name, experts = next(iter(served.blocks.items()))
    hot = next(iter(experts.slot_table.residents))
    for _ in range(50):
        experts.output_energy.observe({hot: 1e9})
    served.settle_precision()
    slot = experts.slots[experts.slot_table.slot(hot)]
    assert slot.nbytes == max(one.nbytes for one in experts.slots.values()), name
    assert slot.format.name in ("int8", "native")


def test_upgrades_happen_while_model_runs(served) -> None:
    served.set_memory(bytes_for(served, int4=16))
    served.settle_precision()
    experts = list(served.blocks.values())[1]
    cold = min(
        experts.slot_table.residents, key=lambda e: experts.slots[experts.slot_table.slot(e)].nbytes
    )
    before = experts.slots[experts.slot_table.slot(cold)].nbytes
    with torch.inference_mode():
        for step in range(200):
            experts.output_energy.observe({cold: 1e9})
            served.model(ids(step, 2))
            served.check()
            if experts.slots[experts.slot_table.slot(cold)].nbytes > before:
                return
    raise AssertionError("an expert that everybody asks for stayed at its precision")


def test_empty_slots_release_bytes(served) -> None:
    served.set_residents({name: [0] for name in served.blocks})
    served.set_memory(bytes_for(served, int2=16))
    served.check()
    assert formats(served) == {"int2": 16}


def test_no_upgrades_while_experts_are_absent(served) -> None:
    one_up = bytes_for(served, int2=15, int3=1) - bytes_for(served, int2=16)
    assert 0 < one_up < bytes_for(served, int2=1) - bytes_for(served)
    served.set_memory(bytes_for(served, int2=15) + one_up)
    served.settle_precision()
    served.check()
    assert formats(served) == {"int2": 15}
    served.set_mode("virtual")
    with torch.inference_mode():
        for step in range(40):
            served.model(ids(step, 4))
            served.check()
    assert set(formats(served)) == {"int2"}  # one more, perhaps, that is just being swapped in


def test_failed_read_keeps_precision(served, monkeypatch) -> None:
    served.set_memory(bytes_for(served, int2=16))
    served.settle_precision()
    with monkeypatch.context() as patch:
        patch.setattr(type(served._store), "read", _fail)
        served.set_memory("4GiB")
        served.settle_precision()
        assert formats(served) == {"int2": 16}
        assert served.report()["load_failures"]["background"] > 0 and served.loads_failing
    served.settle_precision()
    assert formats(served) == {"native": 16}


def test_no_limit_upgrades_all_to_native(served) -> None:
    served.set_memory(bytes_for(served, int2=16))
    served.settle_precision()
    budget = served.set_memory(None)
    served.settle_precision()
    served.check()
    assert formats(served) == {"native": 16}
    held = budget.all_resident_bytes_in()
    assert list(held) == list(AUTO_FORMATS) and held["int2"] == budget.all_resident_bytes
    assert held["native"] == budget.max_bytes == bytes_for(served, native=16)
    assert held["int4"] == bytes_for(served, int4=16)
    served.set_memory(budget.max_bytes - 1)
    served.settle_precision()
    assert formats(served)["native"] == 15


def test_budget_of_one_format_is_capped(folder) -> None:
    budget = memory_budget(build_skeleton(folder), LoadSettings(precision="int4", context=64))
    assert (budget.max_bytes, budget.all_resident_bytes_in()) == (budget.all_resident_bytes, {})


def test_unreachable_budget_changes_nothing(served, monkeypatch) -> None:
    before = served.budget
    with monkeypatch.context() as patch:
        patch.setattr(type(served._store), "read", _fail)
        with pytest.raises(CheckpointError):
            served.set_memory(bytes_for(served, int2=16))
    served.check()
    assert served.budget is before
    served.settle_precision()
    assert formats(served) == {"native": 16}


def _fail(*_: object) -> None:
    raise CheckpointError("the disk is gone")


def test_no_allocation_without_budget(folder) -> None:
    with pytest.raises(ConfigError, match="memory is not given"):
        moefit.load(folder, precision="auto")


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(AUTO_FORMATS[:-1]), st.integers(0, 99))
def test_expected_error_of_normal_weights(name: str, seed: int) -> None:
    specs = {"w": TensorSpec((48, 256), torch.float32)}
    slot = allocate_slot(FORMATS[name], specs, torch.device("cpu"))
    native = {"w": torch.randn(48, 256, generator=torch.Generator().manual_seed(seed))}
    slot.format.encode(slot.tensors, native, specs)
    error = slot.format.relative_error(slot.tensors, native, specs)
    assert error == pytest.approx(GAUSSIAN[name], rel=0.1)
