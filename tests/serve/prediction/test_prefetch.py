"""Prefetching changes no output, whatever is guessed, and pays where the model can be predicted."""

import random
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import FAMILIES, Disk, reading_through, settled, tokens, with_slots
from torch import Tensor

from moefit.cache_argument import forward_with_cache
from moefit.errors import ConfigError
from moefit.moe.routing import Routing
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.serve.prediction.guesses import TRIAL_STEPS

BUDGET = "4GiB"


class SlowDisk(Disk):
    """A disk whose reads take a random time, and whose reads of some experts fail."""

    def __init__(self, seed: int):
        super().__init__()
        self._random, self.slowest = random.Random(seed), 0.0

    def __call__(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        if self.slowest:
            time.sleep(self._random.random() * self.slowest)
        return super().__call__(descriptor, buffer, offset)


class RandomGuesses:
    """A watcher that prefetches random experts of random blocks, however wrong."""

    def __init__(self, served: ServedModel, seed: int):
        self._blocks, self._random = list(served.blocks.values()), random.Random(seed)

    def chosen(self, block: int, routing: Routing) -> None:
        self._blocks[block].slot_table.check()

    def read(self, block: int, x_TD: Tensor) -> None:
        for ahead in (1, 2):
            experts = self._blocks[(block + ahead) % len(self._blocks)]
            table = experts.slot_table
            if ahead == 2 and experts is self._blocks[block]:
                continue  # the experts that are being computed
            absent = {*range(experts.num_experts)} - {*table.residents} - {*table.filling}
            for expert in self._random.sample(sorted(absent), min(len(absent), 3)):
                residents = sorted(table.residents)
                kept = self._random.sample(residents, self._random.randint(0, len(residents)))
                experts.swaps.prefetch(expert, kept)

    def computed(self, block: int) -> None:
        pass


@pytest.fixture(scope="module")
def served(folders) -> Iterator[tuple[ServedModel, SlowDisk, list[Tensor]]]:
    """A model with a slow disk, and the logits that it gives with all experts in memory."""
    with reading_through(SlowDisk(0)) as disk:
        one = load_model(folders("Olmoe"), LoadSettings(context=64, memory=BUDGET))
    with one:
        yield one, disk, decoded(one, [1] * 8)


@torch.inference_mode()
def decoded(served: ServedModel, chunks: list[int]) -> list[Tensor]:
    """Return the logits of one text after each chunk of so many tokens."""
    out, cache = [], None
    for ids_1T in tokens(1, sum(chunks)).split(chunks, dim=1):
        output, cache = forward_with_cache(served.model, cache, input_ids=ids_1T)
        out.append(output.logits[0, -1])
    return out


@settings(deadline=None, max_examples=25, database=None)
@given(
    slots=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    slowest=st.sampled_from([0.0, 0.0005, 0.002]),
    seed=st.integers(0, 999),
)
def test_outputs_are_the_same_whatever_is_guessed(served, slots, slowest, seed) -> None:
    """Bit for bit, with right and wrong guesses in every state when the router has chosen."""
    one, disk, wanted = served
    disk.slowest = slowest
    for count in slots:
        one.set_memory(with_slots(one, count))
        with one.watched(RandomGuesses(one, seed)):
            found = decoded(one, [1] * 8)
        one.check()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    disk.slowest = 0.0
    one.set_memory(BUDGET)
    one.check()


def test_failed_guesses_harm_no_step(served) -> None:
    """A failed read of a guess frees its slot; an expert that is needed is read again."""
    one, disk, wanted = served
    one.set_memory(with_slots(one, 4))
    table = one.blocks[next(iter(one.blocks))].slot_table
    swaps = one.blocks[next(iter(one.blocks))].swaps
    for expert in {*range(8)} - {*table.residents} - {*table.filling}:  # earlier guesses
        disk.failures = 10
        if swaps.prefetch(expert, ()):
            while not all(pending.done.done() for pending in swaps._pending):
                time.sleep(0.001)
        disk.failures = 0
    assert all(torch.equal(a, b) for a, b in zip(decoded(one, [1] * 8), wanted, strict=True))
    one.check()
    one.set_memory(BUDGET)


def test_budget_may_change_while_guesses_are_read(served) -> None:
    one, disk, wanted = served
    disk.slowest = 0.002
    for count in (6, 2, 5, 1, 3):
        with one.watched(RandomGuesses(one, count)):
            decoded(one, [1, 1])
            one.set_memory(with_slots(one, count))  # settles what is being read
            one.check()
    disk.slowest = 0.0
    assert all(torch.equal(a, b) for a, b in zip(decoded(one, [1] * 8), wanted, strict=True))


def test_a_cancelled_guess_leaves_the_expert_that_it_would_displace(served) -> None:
    one, disk, wanted = served
    one.set_memory(with_slots(one, 6))
    one.set_residents({name: [0, 1, 2, 3, 4, 5] for name in one.blocks})
    before, (first, experts) = one.report()["prefetches"], one.blocks.values()
    one.set_residents({first.block.name: []})
    disk.open.clear()
    first.fill()  # the background readers are busy
    assert experts.swaps.prefetch(6, {0, 1, 2}) and experts.swaps.prefetch(7, {0, 1, 2})
    assert len(experts.slot_table.residents) == 4 and experts.swaps.loading == 2
    experts.swaps.end_guesses({6})
    assert sorted(experts.slot_table.residents) == [0, 1, 2, 3, 4, 5]
    disk.open.set()
    settled(one)
    assert one.report()["prefetches"] == before
    one.check()
    assert all(torch.equal(a, b) for a, b in zip(decoded(one, [1] * 8), wanted, strict=True))
    one.set_memory(BUDGET)


def test_a_guess_that_cannot_be_queued_takes_no_slot(served, monkeypatch) -> None:
    one, _, _ = served
    one.set_memory(with_slots(one, 3))
    one.set_residents({name: [0, 1, 2] for name in one.blocks})
    experts = next(iter(one.blocks.values()))
    with monkeypatch.context() as patched:
        patched.setattr(one._shared.transfer, "load", mock.Mock(side_effect=RuntimeError("closed")))
        with pytest.raises(RuntimeError, match="closed"):
            experts.swaps.prefetch(6, ())
    assert sorted(experts.slot_table.residents) == [0, 1, 2]
    one.check()
    one.set_memory(BUDGET)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicts_the_routers_of_families(folders, family: str) -> None:
    """With experts and attention that add nothing, the prediction is the router's own choice."""
    with load_model(
        folders(family), LoadSettings(context=64, memory=BUDGET, prefetch="on")
    ) as served:
        predictor, blocks = served.prefetching.predictor, list(served.blocks.values())
        assert predictor is not None and predictor.predicts(0), served.prefetching.obstacle
        for name, parameter in served.model.named_parameters():
            if "o_proj" in name or "shared_experts.down_proj" in name:
                parameter.data.zero_()
        seen: dict[int, Tensor] = {}
        hooks = [
            one.register_forward_pre_hook(
                lambda _, given, at=one.index: seen.update({at: given[0].reshape(-1, 32).clone()})
            )
            for one in blocks
        ]
        with served.zero_experts(), torch.inference_mode():
            served.model(input_ids=tokens(1, 9), use_cache=False)
        for hook in hooks:
            hook.remove()
        there = blocks[1]
        assert there.state.logits_TE is not None and there.scoring is not None
        logits_TE = there.state.logits_TE.reshape(-1, there.num_experts)
        wanted_TE = there.scoring.preference(logits_TE, there.bias_E)
        with torch.inference_mode():
            found_TE = predictor.scores(0, 1, seen[0])
        assert found_TE is not None and found_TE.isfinite().all()
        assert torch.equal(found_TE.topk(2).indices, wanted_TE.topk(2).indices)


def test_prefetches_what_is_predicted(folders) -> None:
    """On a slow disk most of what is read early is then chosen, and outputs stay the same."""
    wanted = made = None
    for setting in ("off", "on"):
        with reading_through(SlowDisk(1)) as disk:
            how = {"context": 128, "memory": BUDGET, "prefetch": setting}
            one = load_model(folders("Mixtral"), LoadSettings(**how))
        with one:
            one.set_memory(with_slots(one, 4))
            disk.slowest = 0.002
            one.reset()
            made = decoded(one, [1] * 60)
            report = one.report()
            one.check()
        if setting == "off":
            wanted = made
            assert report["prefetches"] == 0 and report["prefetch"]["obstacle"] == "it is off"
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert report["prefetches"] >= report["prefetches_used"] > 0
    assert report["prefetched_bytes"] > report["prefetch_wasted_bytes"]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"memory": None}, "all experts are in memory"),
        ({"prefetch": LoadSettings().prefetch}, "it is off"),
        ({"precision": "auto"}, "precision auto"),
    ],
)
def test_says_why_nothing_is_prefetched(folders, how: dict, why: str) -> None:
    how = {"context": 64, "memory": BUDGET, "prefetch": "on"} | how
    with load_model(folders("Mixtral"), LoadSettings(**how)) as served:
        assert why in served.report()["prefetch"]["obstacle"]


def test_another_budget_begins_a_new_trial(folders) -> None:
    with load_model(
        folders("Mixtral"), LoadSettings(context=64, memory=BUDGET, prefetch="auto")
    ) as served:
        prefetcher = served.prefetching.prefetcher
        assert prefetcher is not None and prefetcher.trial is not None
        trial = prefetcher.trial
        for budget in (with_slots(served, 3), with_slots(served, 5)):
            for _ in range(TRIAL_STEPS):
                used = trial.use(1)
                trial.measured(1, used, 0.5 if used else 1.0, waited=0.5)
            assert trial.pays(1)
            served.set_memory(budget)
            assert served.report()["prefetch"] == {
                "setting": "auto", "obstacle": "", "pays": False, "horizon": 1,
                "predictor": "next router", "probes": None, "probes_ignored": "",
            }  # fmt: skip


def test_an_aborted_step_leaves_no_time_behind(folders) -> None:
    with load_model(
        folders("Mixtral"), LoadSettings(context=64, memory=BUDGET, prefetch="on")
    ) as served:
        served.set_memory(with_slots(served, 4))
        prefetcher = served.prefetching.prefetcher
        assert prefetcher is not None
        decoded(served, [1, 1, 1])
        guess = prefetcher._states[1].guesses[0]
        window = guess.window
        guess.began = time.perf_counter() - 3600  # the step ended before block 1
        decoded(served, [40, 1])
        assert window is not None and guess.window is not None and guess.window < 60


def test_other_modes_and_values(folders) -> None:
    with load_model(
        folders("Mixtral"), LoadSettings(context=64, memory=BUDGET, prefetch="on")
    ) as served:
        assert "all experts are in memory" in served.report()["prefetch"]["obstacle"]
        served.set_memory(with_slots(served, 3))
        assert served.report()["prefetch"]["obstacle"] == ""
        served.set_mode("virtual")
        assert "mode virtual" in served.report()["prefetch"]["obstacle"]
    with pytest.raises(ConfigError, match="prefetch='always' is not one of off, auto, on"):
        LoadSettings(prefetch="always").check()  # pyright: ignore[reportArgumentType]
