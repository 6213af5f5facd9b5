"""`refetch` over a tiny model: what is computed from which format, within which bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ask, generated, greedy, prompts, running
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import saved, tiny, tokens

import moefit
from moefit.errors import BudgetTooSmallError, CheckpointError, ConfigError
from moefit.quant.format import FORMATS, dense_tensors, parse_format
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.build import pack
from moefit.serve.precision.allocate import AUTO_FORMATS
from moefit.serve.precision.refetch import SCRATCH_SLOTS
from moefit.server.metrics import ModelCollector

CPU = torch.device("cpu")
HOW: dict[str, Any] = {"precision": "auto", "memory": "4GiB", "context": 64}
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Packed in all formats; its weights don't add up to one (OLMoE)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = saved(tiny("Olmoe", **WIDE), tmp_path_factory.mktemp("again"))
        pack(build_skeleton(made), [parse_format(name) for name in AUTO_FORMATS[:-1]])
        yield made


@pytest.fixture(scope="module")
def loaded(folder) -> Iterator[ServedModel]:
    with moefit.load(folder, refetch=0.3, **HOW) as served:
        yield served


@pytest.fixture
def served(loaded: ServedModel) -> ServedModel:
    """Sixteen experts in two to four bits."""
    loaded.set_mode("exact", refetch=0.3)
    loaded.set_memory(bytes_for(loaded, int4=5, int2=11))
    loaded.set_residents({name: range(one.num_experts) for name, one in loaded.blocks.items()})
    loaded.settle_precision()
    loaded.reset()
    return loaded


def bytes_for(served: ServedModel, **counts: int) -> int:
    specs = next(iter(served.blocks.values())).block.layout.specs
    return served.budget.fixed + sum(n * FORMATS[f].nbytes(specs) for f, n in counts.items())


class Twin:
    """The slow obvious way: every expert's weights decoded, from the format that the rule names."""

    def __init__(self, served: ServedModel):
        self.served, self.again, self.steps = served, 0, 0

    def compare(self, experts: VirtualExperts, given: tuple[Any, ...], output: Any) -> None:
        """What a block gave is what decoded weights give, one token and expert after the other."""
        x_TD = given[0].reshape(-1, given[0].shape[-1])
        chosen = experts.block.layout.routing(len(x_TD), *given[1:])
        again = self.read_again(experts, chosen)
        y_TD = torch.zeros_like(x_TD)
        for token, row in enumerate(chosen.ids_TK.tolist()):
            for expert, weight in zip(row, chosen.weights_TK[token].tolist(), strict=True):
                name = "int8" if expert in again else format_now(experts, expert)
                tensors = self.decoded(experts, expert, name)
                x_1D = x_TD[token : token + 1]
                y_TD[token] += weight * experts.block.layout.output(tensors, x_1D)[0]
        difference = (output.reshape(y_TD.shape) - y_TD).norm() / y_TD.norm()
        assert difference < 0.01, difference
        self.again, self.steps = self.again + len(again), self.steps + 1

    def read_again(self, experts: VirtualExperts, chosen: Any) -> set[int]:
        threshold = self.served.policy.refetch
        if threshold is None or self.served.policy.mode != "exact" or experts.prefilling:
            return set()
        found = set()
        for ids, weights in zip(chosen.ids_TK.tolist(), chosen.weights_TK.tolist(), strict=True):
            for expert, weight in zip(ids, weights, strict=True):
                worse = AUTO_FORMATS.index(format_now(experts, expert)) < AUTO_FORMATS.index("int8")
                if worse and weight / sum(weights) >= threshold:
                    found.add(expert)
        return found

    def decoded(self, experts: VirtualExperts, expert: int, name: str) -> Any:
        specs = experts.block.layout.specs
        slot = allocate_slot(FORMATS[name], specs, CPU)
        self.served._store.read(experts.block.name, expert, slot)
        return dense_tensors(specs, slot.tensors, torch.float32)


def format_now(experts: VirtualExperts, expert: int) -> str:
    if expert not in experts.slot_table.residents:
        return "int2"
    return experts.slots[experts.slot_table.slot(expert)].format.name


@contextmanager
def beside(served: ServedModel) -> Iterator[Twin]:
    twin = Twin(served)
    hooks = [one.register_forward_hook(twin.compare) for one in served.blocks.values()]
    try:
        yield twin
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def decode(served: ServedModel, ids_BT: torch.Tensor, steps: int) -> torch.Tensor:
    """A prompt, and then tokens one by one: their logits."""
    prompt = ids_BT.shape[1] - steps
    output = served.model(ids_BT[:, :prompt], use_cache=True)
    rows = []
    for at in range(prompt, ids_BT.shape[1]):
        output = served.model(ids_BT[:, at : at + 1], past_key_values=output.past_key_values)
        rows.append(output.logits)
        served.check()
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("threshold", [1.0, 0.4, 0.25, 0.01])
def test_it_is_what_decoded_weights_of_the_rules_formats_give(
    served: ServedModel, threshold: float, sequences: int
) -> None:
    served.set_mode("exact", refetch=threshold)
    with beside(served) as twin:
        decode(served, tokens(sequences, 12), 8)
    assert twin.steps == 2 * 9
    assert (twin.again == 0) == (threshold == 1.0)
    assert 0 <= served.report()["refetches"] <= twin.again


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("memory"), st.sampled_from(["int2", "int3", "int5", "native"]),
                      st.integers(2, 16)),
            st.tuples(st.just("mode"), st.sampled_from(["exact", "virtual", "bounded"])),
            st.tuples(st.just("share"), st.sampled_from([None, 0.2, 0.3, 0.6])),
            st.tuples(st.just("decode"), st.integers(1, 3), st.integers(0, 99)),
        ),
        min_size=3, max_size=10,
    )
)  # fmt: skip
def test_whatever_is_changed_while_it_runs(loaded: ServedModel, changes: list[Any]) -> None:
    loaded.set_mode("exact", refetch=0.3)
    for what, *values in changes:
        if what == "memory":
            loaded.set_memory(bytes_for(loaded, **{values[0]: values[1]}))
        elif what == "mode":
            before = loaded.policy.refetch
            assert loaded.set_mode(values[0]).refetch == before, "it rests in other modes"
        elif what == "share":
            loaded.set_mode("exact", refetch=values[0])
        elif loaded.policy.mode == "exact":
            with beside(loaded):
                decode(loaded, tokens(values[0], 8, seed=values[1]), 4)
        else:
            before = loaded.report()["refetches"]
            decode(loaded, tokens(values[0], 8, seed=values[1]), 4)
            assert loaded.report()["refetches"] == before
        loaded.check()


def test_what_was_read_before_does_not_show_in_the_output(served: ServedModel) -> None:
    served.set_mode("exact", refetch=0.25, residency="fixed")
    first = decode(served, tokens(2, 12), 8)
    decode(served, tokens(1, 30, seed=7), 20)
    assert torch.equal(decode(served, tokens(2, 12), 8), first)
    served.set_mode("exact", refetch=None)
    assert not torch.equal(decode(served, tokens(2, 12), 8), first)
    served.set_mode("exact", residency="manager")


def test_prompts_are_computed_as_they_lie(served: ServedModel) -> None:
    served.set_mode("exact", refetch=0.01)
    with torch.inference_mode():
        served.model(tokens(2, 20))
    assert served.report()["refetches"] == 0
    with torch.inference_mode():
        served.model(tokens(2, 1))
    assert served.report()["refetches"] > 0


def test_experts_in_the_best_format_are_not_read_again(served: ServedModel) -> None:
    served.set_memory("4GiB")
    served.settle_precision()
    decode(served, tokens(1, 12), 8)
    assert served.report()["refetches"] == 0


def test_an_absent_expert_is_read_once_in_the_better_format(served: ServedModel) -> None:
    served.set_memory(bytes_for(served, int2=4))
    served.set_residents(dict.fromkeys(served.blocks, ()))
    served.set_mode("exact", refetch=0.01)
    served.reset()
    loads = served.report()["loads"]
    with torch.inference_mode(), beside(served) as twin:
        served.model(tokens(1, 1))
    report = served.report()
    assert 0 < twin.again < 8 and report["fetches"] + report["hits"] == 8
    assert report["refetches"] + report["hits"] == twin.again, "some copies were there"
    assert report["loads"] - loads == report["fetches"], "and none twice"


def test_requests_that_share_steps(served: ServedModel) -> None:
    served.set_mode("exact", refetch=0.25, residency="fixed")
    expected = generated(served, prompts([5])[0])
    with running(served) as engine:
        assert ask(engine, prompts([5])[0], greedy()).wait().tokens == expected
        served.reset()
        with beside(served) as twin:
            heard = [ask(engine, prompt, greedy(12)) for prompt in prompts([5, 13, 1])]
            assert {one.end.reason for one in heard} == {"length"}, heard[0].end
        report = served.report()
        assert twin.again >= report["refetches"] > 0
        counted = {
            one.name: one for one in ModelCollector("m", engine.stats, served.report).collect()
        }
    for name in ("refetches", "refetch_bytes"):
        (total,) = counted[f"moefit:expert_{name}"].samples
        assert total.value == report[name]
    served.set_mode("exact", residency="manager")


def test_the_report_and_the_ledger(served: ServedModel, folder: Path) -> None:
    specs = next(iter(served.blocks.values())).block.layout.specs
    size = FORMATS["int8"].nbytes(specs)
    with_copies, without = (
        memory_budget(build_skeleton(folder), LoadSettings(**HOW, refetch=share))
        for share in (0.3, None)
    )
    assert with_copies.staging - without.staging == SCRATCH_SLOTS * size
    assert with_copies.min_bytes - without.min_bytes == pytest.approx(
        SCRATCH_SLOTS * size, abs=8 << 20
    )
    read = served.report()["bytes_read"]
    decode(served, tokens(1, 12), 8)
    report = served.report()
    assert report["refetch"] == 0.3 and report["scratch_bytes"] == SCRATCH_SLOTS * size
    assert report["refetch_bytes"] == size * report["refetches"] <= report["bytes_read"] - read
    assert report["hit_rate"] == 1.0, "all experts are in memory"
    with pytest.raises(BudgetTooSmallError):
        served.set_memory(served.budget.min_bytes - 1)
    served.check()


def test_a_damaged_copy_is_named_and_the_model_goes_on(served: ServedModel, monkeypatch) -> None:
    served.set_mode("exact", refetch=0.01)
    expected = decode(served, tokens(1, 12), 8)
    with monkeypatch.context() as patch:
        patch.setattr("moefit.serve.packed.file.PackedFile.damage", lambda *_: "it is damaged")
        with pytest.raises(CheckpointError, match="is damaged"):
            decode(served, tokens(1, 12, seed=5), 8)
        served.check()
    again = decode(served, tokens(1, 12), 8)
    served.check()
    assert torch.equal(again, expected) or served._upgrades is not None


def test_without_it_nothing_is_reserved_and_it_cannot_be_set(folder: Path) -> None:
    with moefit.load(folder, **HOW) as plain:
        assert plain.report()["scratch_bytes"] == 0 and plain.report()["refetch"] is None
        with pytest.raises(ConfigError, match="none were reserved when the model was loaded"):
            plain.set_mode("exact", refetch=0.3)
        plain.set_mode("virtual", refetch=None)


def test_it_is_refused_beside_other_modes_and_bad_shares(served: ServedModel) -> None:
    before = served.policy
    for mode in ("bounded", "virtual"):
        with pytest.raises(ConfigError, match=f"mode exact, and the mode is '{mode}'"):
            served.set_mode(mode, refetch=0.3)
    with pytest.raises(ConfigError, match="above 0, 1 at most"):
        served.set_mode("exact", refetch=0)
    assert served.policy == before


@pytest.mark.parametrize("formats", [[], ["int2"]])
def test_nothing_better_that_is_packed_is_refused_before_loading(
    formats: list[str], packed_cache: Path, tmp_path: Path
) -> None:
    other = saved(tiny("Olmoe", **WIDE), tmp_path / "model")
    pack(build_skeleton(other), [parse_format(name) for name in formats])
    with pytest.raises(ConfigError, match=r"2 of 2 blocks .*moefit pack MODEL --formats"):
        moefit.load(other, refetch=0.3, **HOW)
    pack(build_skeleton(other), [parse_format("int3")])
    with moefit.load(other, refetch=0.3, **HOW) as served:
        served.set_memory(bytes_for(served, int2=16))
        served.settle_precision()
        decode(served, tokens(1, 12), 8)
        assert served.report()["refetches"] > 0
