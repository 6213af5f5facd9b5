"""Guesses several layers ahead: nearer ones first, reads that a step waits for before all."""

import random
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import Disk, reading_through, saved, settled, tiny, tokens, with_slots
from torch import Tensor

from moefit.cache_argument import forward_with_cache
from moefit.errors import ConfigError
from moefit.moe.routing import Routing
from moefit.serve.cache.swaps import Swaps
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.serve.prediction.guesses import (
    LEAST_CONFIDENCE,
    Candidates,
    choose_nearest_first,
)
from moefit.serve.prediction.prefetch import Prefetcher

LAYERS, EXPERTS = 5, 8


class Guesses:
    """A predictor that finds random experts, or those given for a block."""

    def __init__(self, seed: int = 0, by_block: Mapping[int, set[int]] | None = None):
        self._random, self._by_block = random.Random(seed), by_block or {}

    def predicts(self, block: int, ahead: int = 1) -> bool:
        return block + ahead < LAYERS

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor:
        found = self._by_block.get(block + ahead)
        chosen = self._random.sample(range(EXPERTS), 3) if found is None else found
        scores_TE = torch.full((len(x_TD), EXPERTS), -1.0)
        scores_TE[:, list(chosen)] = 1.0
        return scores_TE


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[ServedModel, Disk, list[Tensor]]]:
    """A model of five layers, its disk, and its logits with all experts in memory."""
    folder = tmp_path_factory.mktemp("five")
    saved(tiny("Olmoe", num_hidden_layers=LAYERS), folder)
    with reading_through(Disk()) as disk:
        one = load_model(folder, LoadSettings(context=64, memory="4GiB"))
    with one:
        yield one, disk, decoded(one)


@torch.inference_mode()
def decoded(served: ServedModel) -> list[Tensor]:
    out, cache = [], None
    for ids_11 in tokens(1, 12).split(1, dim=1):
        output, cache = forward_with_cache(served.model, cache, input_ids=ids_11)
        out.append(output.logits[0, -1])
    return out


def looking(served: ServedModel, horizon: int, predictor: Any) -> Prefetcher:
    """Return a prefetcher that takes all confident guesses for worth a read."""
    found = Prefetcher(list(served.blocks.values()), served._shared, predictor, None, horizon)
    for state in found._states:
        state.chosen = 3
        for guess in state.guesses:
            guess.window = 60.0
    return found


probabilities = st.dictionaries(st.integers(0, 15), st.floats(0, 1), max_size=6)
blocks = st.builds(Candidates, absent=probabilities, window=st.floats(0, 9), most=st.integers(0, 4))


@given(st.lists(blocks, min_size=1, max_size=4), st.floats(0.1, 3), st.integers(0, 3))
def test_farther_guesses_queue_behind_nearer_ones(found, load, queued) -> None:
    chosen = choose_nearest_first(found, load=load, queued=queued)
    ahead = queued
    for number, (one, experts) in enumerate(zip(found, chosen, strict=True)):
        # Whatever lies farther away changes nothing for this block.
        assert chosen[: number + 1] == choose_nearest_first(
            found[: number + 1], load=load, queued=queued
        )
        assert len(experts) <= one.most
        assert all(one.absent[expert] >= LEAST_CONFIDENCE for expert in experts)
        left = set(one.absent) - set(experts)
        assert all(one.absent[a] >= one.absent[b] for a in experts for b in left)
        for expert in experts:  # each read begins before its router has chosen, or cannot gain
            assert ahead * load < one.window or one.absent[expert] == 0
            ahead += 1


@settings(deadline=None, max_examples=8, database=None)
@given(horizon=st.integers(2, 4), slots=st.integers(2, 7), seed=st.integers(0, 999))
def test_order_and_outputs(served, horizon: int, slots: int, seed: int) -> None:
    """Bit-equal outputs; nearest first; no likely resident is displaced."""
    one, _, wanted = served
    one.set_memory(with_slots(one, slots))
    watcher = looking(one, horizon, Guesses(seed))
    number = {experts.block.name: at for at, experts in enumerate(one.blocks.values())}
    calls: list[tuple[int, int]] = []
    here, prefetch, read = -1, Swaps.prefetch, watcher.read

    def reading(block: int, x_TD: Tensor) -> None:
        nonlocal here
        here = block
        calls.clear()
        read(block, x_TD)
        distances = [ahead for ahead, _ in calls]
        assert distances == sorted(distances)
        assert set(distances) <= set(range(1, horizon + 1))

    def prefetching(swaps: Swaps, expert: int, protected: Any) -> bool:
        before = set(swaps._slot_table.residents)
        calls.append((number[swaps._block] - here, expert))
        began = prefetch(swaps, expert, protected)
        assert set(protected) & before <= set(swaps._slot_table.residents)
        return began

    with (
        mock.patch.object(Swaps, "prefetch", prefetching),
        mock.patch.object(watcher, "read", reading),
        one.watched(watcher),
    ):
        found = decoded(one)
    one.check()
    assert not watcher.failure
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_reads_that_a_layer_waits_for_come_before_farther_guesses(served) -> None:
    one, disk, wanted = served
    one.set_memory(with_slots(one, 6))
    one.set_residents({name: [0, 1, 2, 3, 4, 5] for name in one.blocks})
    here = list(one.blocks.values())
    guesses = Guesses(by_block={1: {6, 7}, 2: {6, 7}, 3: {6, 7}, 4: {0}})
    watcher = looking(one, 3, guesses)
    watcher._step.prefetches = True
    disk.open.clear()
    watcher.read(0, torch.zeros(1, 32))
    while sum(pending.done.running() for pending in here[1].swaps._pending) < 2:
        time.sleep(0.001)  # until both threads have begun with those of the next layer
    assert [sorted(experts.slot_table.filling) for experts in here] == [[], *[[6, 7]] * 3, []]
    watcher._step.block, watcher._step.tokens = 0, 1
    here[1].swaps.end_guesses({6})
    watcher.chosen(1, Routing(torch.tensor([[6, 0, 1]]), torch.ones(1, 3)))
    assert [sorted(experts.slot_table.filling) for experts in here] == [[], [6, 7], [], [], []]
    assert all(sorted(experts.slot_table.residents) == [*range(6)] for experts in here[2:])
    watcher.read(1, torch.zeros(1, 32))  # chosen anew, from a state that is nearer
    assert [sorted(experts.slot_table.filling) for experts in here] == [[], *[[6, 7]] * 3, []]
    disk.open.set()
    settled(one)
    one.check()
    assert all(torch.equal(a, b) for a, b in zip(decoded(one), wanted, strict=True))


def test_right_guesses_two_layers_ahead_are_found_in_memory(served) -> None:
    """The experts of the third layer are read while the second computes, and are used there."""
    one, _, _ = served
    one.set_memory(with_slots(one, 6))
    blocks = list(one.blocks.values())
    one.set_residents({name: [0, 1, 2, 3, 4, 5] for name in one.blocks})
    watcher = looking(one, 2, Guesses(by_block={1: {0, 1, 2}, 2: {6, 7, 0}}))
    watcher._step.prefetches = True
    watcher.read(0, torch.zeros(1, 32))
    settled(one)
    watcher._step.block, watcher._step.tokens = 0, 1
    watcher.chosen(1, Routing(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)))
    blocks[2].swaps.publish()
    assert {0, 6, 7} <= set(blocks[2].slot_table.residents)
    one.check()


def test_a_horizon_is_checked_and_reported(tmp_path) -> None:
    folder = saved(tiny("Mixtral", num_hidden_layers=3), tmp_path)
    for given_, says in (
        ({"prefetch": "on", "prefetch_horizon": 5}, "1 to 4 layers ahead"),
        ({"prefetch": "on", "prefetch_horizon": 0}, "1 to 4 layers ahead"),
        ({"prefetch_horizon": 2}, "prefetch is off"),
    ):
        with pytest.raises(ConfigError, match=says):
            LoadSettings(**given_).check()  # pyright: ignore[reportArgumentType]
    how = LoadSettings(context=64, memory="4GiB", prefetch="on", prefetch_horizon=3)
    with load_model(folder, how) as one:
        one.set_memory(with_slots(one, 4))
        assert one.report()["prefetch"]["horizon"] == 3
