"""A divided layer takes about what the cost model says, in time that is counted, not measured.

Copies, experts on the device and experts in host memory take what the costs say on a counted clock;
the order in which all of them happen is that of the invoker.
"""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.host_experts import Demand
from moefit.serve.hybrid.rules import fetch_all, layer_time, search
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.stats import Counters

EXPERTS, SLOTS, READERS = 64, 16, 2
AIM = 1.1


class Copy(Future):
    """A copy that ends at a time of the clock."""

    def __init__(self, link: "Link", ends: float):
        super().__init__()
        self._link, self._ends = link, ends

    def done(self) -> bool:
        return self._link.now >= self._ends

    def result(self, timeout: float | None = None) -> float:
        self._link.now = max(self._link.now, self._ends)
        return 0.0


class Link:
    """A `Transfer` that copies one expert after the other, and the clock of the device."""

    readers = READERS

    def __init__(self, load: float):
        self.now, self._free, self._load = 0.0, 0.0, load

    def load(self, block: str, expert: int, slot: object) -> Copy:
        self._free = max(self.now, self._free) + self._load
        return Copy(self, self._free)


class FarSide:
    """Divides misses as a server does; what it computes ends at a time of the clock."""

    def __init__(self, costs: Costs, rule: Any, link: Link):
        self._costs, self._rule, self._link = costs, rule, link
        self.model = 0.0
        self.experts: Mapping[int, object] = {}
        self._ends = 0.0

    def begin(
        self, demand: Demand, absent: Sequence[int], slots: object, *, loading: bool
    ) -> tuple[list[int], "FarSide | None"]:
        ordered = sorted(absent, key=lambda one: -len(demand.rows[one]))
        tokens = [len(demand.rows[one]) for one in ordered]
        resident = [len(rows) for one, rows in demand.rows.items() if one not in absent]
        number = self._rule(self._costs, tokens, resident)
        both = layer_time(self._costs, tokens, resident, number)
        self.model, self._ends = max(both), self._link.now + both[1]
        self.experts = dict.fromkeys(ordered[number:])
        return ordered[:number], self if self.experts else None

    def collect(self, y_RD: object) -> None:
        self._link.now = max(self._link.now, self._ends)

    def cancel(self) -> None: ...

    def end(self) -> None: ...


def counted(costs: Costs, rule: Any, tokens: int, *, seed: int) -> list[float]:
    """Return times over the model's of ten steps of a layer, whose slots hold earlier experts."""
    link = Link(costs.load)
    far = FarSide(costs, rule, link)
    table = SlotTable(EXPERTS, SLOTS, LeastRecentlyUsed())
    block: Any = SimpleNamespace(name="block", num_experts=EXPERTS)
    slots: Any = dict.fromkeys(range(SLOTS))
    invoker = ExpertInvoker(block, table, slots, link, Counters())  # pyright: ignore
    invoker.host = far  # pyright: ignore
    chance, found = random.Random(seed), list[float]()
    weights = [EXPERTS - one / 2 for one in range(EXPERTS)]
    for _ in range(11):
        rows: dict[int, list[int]] = {}
        for row in range(8 * tokens):
            rows.setdefault(chance.choices(range(EXPERTS), weights)[0], []).append(row)
        demand, began = Demand(torch.empty(0), rows, 8, torch.empty(0)), link.now
        far.model = 0.0
        # The part of a layer that decides an order; the rest multiplies matrices.
        for batch in invoker._batches(demand, together=True):
            link.now += sum(costs.on_gpu(len(rows[expert])) for expert, _ in batch)
        if far.model:
            found.append((link.now - began) / far.model)
    return found[1:]  # the first step found empty slots


@pytest.mark.parametrize("rule", [search, fetch_all])
@pytest.mark.parametrize("tokens", [4, 16, 64])
@pytest.mark.parametrize("load", [0.5, 2.5, 4.0])
def test_a_layer_takes_what_the_model_says(rule: Any, tokens: int, load: float) -> None:
    """Slots are all wanted by the step, copies take half to four times an expert's computation."""
    costs = Costs(load=load, gpu=(1.0, 0.05), far=(1.2, 0.1), activations=0.001, start=0.05)
    ratios = counted(costs, rule, tokens, seed=tokens)
    assert len(ratios) == 10
    assert min(ratios) > 0.999, "the model is a lower bound"
    assert max(ratios) < AIM, ratios
