import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from tiny_served import MemoryStore, OverStorage, mixtral_block, parts_of
from torch import Tensor

from moefit.moe.experts import expert_weights, reference_experts
from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.quant.format import NativeFormat
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.scores import ExpertImportanceEstimator, VirtualExpertManager
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.cache.swaps import SharedState
from moefit.serve.config import Policy
from moefit.serve.io.loads import Transfer
from moefit.serve.layer.moe_layer import VirtualExperts

NUM_EXPERTS, WIDTH, K = 8, 32, 2
RULE = ScoringRule(score="softmax", chosen="normalised")
CPU = torch.device("cpu")


class Bench:
    """One served block with a router that the test controls."""

    def __init__(self, slots: int, **policy: Any):
        block, module = mixtral_block()
        self.store = MemoryStore(block, module)
        self.transfer = Transfer(self.store, readers=2)
        self.shared = SharedState(
            policy=Policy(**policy),
            manager=VirtualExpertManager(every=1, max_swaps=2, margin=0.1),
            transfer=self.transfer,
        )
        eviction = LeastRecentlyUsed()
        self.experts = VirtualExperts(
            block,
            self.shared,
            SlotTable(NUM_EXPERTS, slots, eviction),
            {index: new_slot() for index in range(slots)},
            eviction,
            ExpertImportanceEstimator(NUM_EXPERTS, half_life_tokens=4),
        )
        self.experts.scoring = RULE
        spares = [new_slot() for _ in range(2)]
        self.shared.spares[spares[0].format.name, spares[0].nbytes] = spares
        self.held = slots + 2

    @property
    def residents(self) -> set[int]:
        return set(self.experts.slot_table.residents)

    def step(self, logits_TE: Tensor, *, seed: int = 0, prefilling: bool = False):
        """Return the block's output, its tokens and its routing."""
        x_TD = torch.randn(len(logits_TE), WIDTH, generator=torch.Generator().manual_seed(seed))
        best_TK, ids_TK = logits_TE.softmax(-1).topk(K)
        routing = Routing(ids_TK, best_TK / best_TK.sum(-1, keepdim=True))
        self.experts.state.logits_TE, self.experts.state.prefilling = logits_TE, prefilling
        with torch.inference_mode():
            y_TD = self.experts(x_TD, routing.ids_TK, routing.weights_TK)
        return y_TD, x_TD, routing

    def wait(self) -> None:
        """Wait until no load is running; nothing is published."""
        for pending in self.experts.swaps._pending:
            while not pending.done.done():
                time.sleep(0.001)

    def check(self) -> None:
        """Check that tables agree, all slots exist, and residents are complete."""
        self.experts.slot_table.check()
        self.experts.swaps.check()
        slots = self.experts.slots
        assert self.experts.slot_table.num_slots == len(slots)
        assert len(slots) + sum(map(len, self.shared.spares.values())) == self.held
        block, module = mixtral_block()
        for expert in self.residents:
            slot = slots[self.experts.slot_table.slot(expert)]
            for short, value in parts_of(module, block, expert).items():
                assert torch.equal(slot.tensors[short], value), f"expert {expert} is not whole"

    def close(self) -> None:
        self.store.gate.set()
        self.transfer.close()


def new_slot() -> Slot:
    return allocate_slot(NativeFormat(), mixtral_block()[0].layout.specs, CPU)


@pytest.fixture
def make() -> Iterator[Any]:
    benches: list[Bench] = []

    def bench(slots: int, **policy: Any) -> Bench:
        benches.append(Bench(slots, **policy))
        return benches[-1]

    yield bench
    for one in benches:
        one.close()


def preferring(*experts: int, tokens: int = 1) -> Tensor:
    """Return logits that rank these experts highest, in this order."""
    logits_E = torch.linspace(0.2, 0, NUM_EXPERTS)
    for rank, expert in enumerate(experts):
        logits_E[expert] = 4.0 - 0.5 * rank
    return logits_E.expand(tokens, -1).clone()


def reference(x_TD: Tensor, routing: Routing) -> Tensor:
    with torch.no_grad():
        return reference_experts(x_TD, routing, expert_weights(mixtral_block()[1]))


def restricted(logits_TE: Tensor, residents: set[int]) -> Routing:
    """Reference: the K best residents, one token at a time."""
    ids, weights = [], []
    for logits_E in logits_TE:
        best = sorted(residents, key=lambda e: -float(logits_E[e]))[:K]
        score_K = logits_E.softmax(-1)[best]
        ids.append(best + [NUM_EXPERTS] * (K - len(best)))
        weights.append([*(score_K / score_K.sum()).tolist(), *[0.0] * (K - len(best))])
    return Routing(torch.tensor(ids), torch.tensor(weights))


@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_exact_equals_reference_at_any_number_of_slots(make, slots: int) -> None:
    bench = make(slots)
    for seed in range(6):
        y_TD, x_TD, routing = bench.step(torch.randn(1 + 4 * (seed % 2), NUM_EXPERTS), seed=seed)
        torch.testing.assert_close(y_TD, reference(x_TD, routing))
        bench.check()
    assert bench.shared.counters.substituted_mass == 0


def test_virtual_uses_residents_only(make) -> None:
    bench = make(3, mode="virtual")
    bench.experts.set_residents([1, 4, 6])
    reads = len(bench.store.reads)
    logits_TE = preferring(0, 4, 6)
    y_TD, x_TD, routing = bench.step(logits_TE)
    assert routing.ids_TK.tolist() == [[0, 4]]
    torch.testing.assert_close(y_TD, reference(x_TD, restricted(logits_TE, {1, 4, 6})))
    weights_K = routing.weights_TK[0]
    assert bench.shared.counters.substituted_mass == pytest.approx(float(weights_K[0]), rel=1e-5)
    bench.wait()
    assert bench.store.reads[reads:] == [0], "the router's choice counts, absent or not"
    bench.check()


def test_swap_is_visible_when_complete(make) -> None:
    bench = make(2, mode="virtual")
    bench.experts.set_residents([1, 4])
    bench.store.gate.clear()
    for _ in range(5):
        y_TD, x_TD, _ = bench.step(preferring(0, 5))
        torch.testing.assert_close(y_TD, reference(x_TD, restricted(preferring(0, 5), {1, 4})))
        assert bench.residents == {1, 4}
        bench.check()
    bench.store.gate.set()
    bench.wait()
    assert bench.residents == {1, 4}, "nothing changes but at a step's border"
    y_TD, x_TD, routing = bench.step(preferring(0, 5))
    assert bench.residents == {0, 5}
    torch.testing.assert_close(y_TD, reference(x_TD, routing))
    assert bench.shared.counters.swaps == 2
    bench.check()


def test_virtual_fetches_while_slots_are_empty(make) -> None:
    bench = make(4, mode="virtual")
    bench.experts.set_residents([1])
    y_TD, x_TD, routing = bench.step(preferring(2, 7))
    torch.testing.assert_close(y_TD, reference(x_TD, routing))
    assert {2, 7} <= bench.residents
    bench.check()


def test_prefill_follows_its_own_mode(make) -> None:
    bench = make(2, mode="virtual", prefill="exact")
    bench.experts.set_residents([1, 4])
    logits_TE = preferring(0, 5, tokens=3)
    y_TD, x_TD, routing = bench.step(logits_TE, prefilling=True)
    torch.testing.assert_close(y_TD, reference(x_TD, routing))
    bench.experts.set_residents([1, 4])
    y_TD, x_TD, _ = bench.step(logits_TE, prefilling=False)
    torch.testing.assert_close(y_TD, reference(x_TD, restricted(logits_TE, {1, 4})))


def test_bounded_fetches_heavy_and_substitutes_light_experts(make) -> None:
    bench = make(3, mode="bounded", bound=0.3, protected=0)
    bench.experts.set_residents([1, 4, 6])
    even_TE = preferring(0, 4, 6)
    bench.step(even_TE)
    assert 0 in bench.residents, "more than half of the weight is not given up"
    bench.experts.set_residents([1, 4, 6])
    steep_TE = preferring(4, 0, 6)
    steep_TE[0, 4] = 6.0
    y_TD, x_TD, _ = bench.step(steep_TE)
    assert bench.residents == {1, 4, 6}
    torch.testing.assert_close(y_TD, reference(x_TD, restricted(steep_TE, {1, 4, 6})))
    bench.check()


@pytest.mark.parametrize("mode", ["exact", "bounded", "virtual"])
def test_fixed_residents_do_not_change(make, mode: str) -> None:
    bench = make(3, mode=mode, residency="fixed")
    bench.experts.set_residents([1, 4, 6])
    scores = bench.experts.importance.scores()
    first = [bench.step(torch.randn(2, NUM_EXPERTS, generator=g), seed=1)[0]
             for g in [torch.Generator().manual_seed(seed) for seed in range(5)]]  # fmt: skip
    assert bench.residents == {1, 4, 6} and not bench.experts.swaps
    again = [bench.step(torch.randn(2, NUM_EXPERTS, generator=g), seed=1)[0]
             for g in [torch.Generator().manual_seed(seed) for seed in range(5)]]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert bench.experts.importance.scores() == scores
    bench.check()


def test_step_waits_for_a_slot(make) -> None:
    bench = make(2)
    bench.store.gate.clear()
    bench.experts.fill()
    filling = set(bench.experts.slot_table.filling)
    assert len(filling) == 2 and not bench.residents
    threading.Timer(0.1, bench.store.gate.set).start()
    wanted = sorted(set(range(NUM_EXPERTS)) - filling)[:2]
    y_TD, x_TD, routing = bench.step(preferring(*wanted))
    torch.testing.assert_close(y_TD, reference(x_TD, routing))
    bench.check()


def test_failed_swap_is_retried(make) -> None:
    bench = make(2, mode="virtual")
    bench.experts.set_residents([1, 4])
    bench.store.broken = {0, 5}
    for _ in range(4):
        y_TD, x_TD, _ = bench.step(preferring(0, 5))
        torch.testing.assert_close(y_TD, reference(x_TD, restricted(preferring(0, 5), {1, 4})))
        bench.wait()
        assert bench.residents == {1, 4}
        bench.check()
    bench.store.broken = set()
    for _ in range(3):
        bench.step(preferring(0, 5))
        bench.wait()
    assert bench.residents == {0, 5}
    bench.check()


def test_failed_fetch_raises_and_next_step_works(make) -> None:
    for policy in ({"mode": "exact"}, {"mode": "exact", "residency": "fixed"}):
        bench = make(2, **policy)
        bench.experts.set_residents([1, 4])
        bench.store.broken = {0}
        with pytest.raises(OSError, match="storage is gone"):
            bench.step(preferring(0, 5))
        bench.check()
        bench.store.broken = set()
        y_TD, x_TD, routing = bench.step(preferring(0, 5))
        torch.testing.assert_close(y_TD, reference(x_TD, routing))
        bench.check()


def test_failed_restore_keeps_slots(make) -> None:
    bench = make(2, mode="exact", residency="fixed")
    bench.experts.set_residents([1, 4])
    bench.store.broken = {1, 4}
    with pytest.raises(OSError, match="storage is gone"):
        bench.step(preferring(0, 5))
    bench.check()
    assert not bench.experts.slot_table.filling


def test_fixed_residents_survive_failed_fetch(make) -> None:
    bench = make(2, mode="exact", residency="fixed")
    bench.experts.set_residents([1, 4])
    bench.store.broken = {5}
    with pytest.raises(OSError, match="storage is gone"):
        bench.step(preferring(0, 5))
    assert bench.residents == {1, 4}
    bench.check()


def test_swap_evicts_another_if_victim_has_left(make) -> None:
    """A swap's victim may be evicted by an exact prefill before the swap is published."""
    bench = make(1, mode="virtual", prefill="exact")
    bench.experts.set_residents([1])
    bench.store.gate.clear()
    bench.step(preferring(0))
    assert len(bench.experts.swaps) == 1
    threading.Timer(0.1, bench.store.gate.set).start()
    y_TD, x_TD, routing = bench.step(preferring(6, 7, tokens=3), prefilling=True)
    torch.testing.assert_close(y_TD, reference(x_TD, routing))
    bench.wait()
    bench.step(preferring(0))
    bench.wait()
    bench.step(preferring(0))
    assert len(bench.experts.slots) in (1, 2)
    bench.experts.swaps.settle()
    bench.check()
    assert len(bench.experts.slots) == 1 and len(bench.residents) == 1


def test_importance_observes_routers_choice_times_norm(make) -> None:
    for tokens in (1, 3):
        bench = make(2, mode="virtual")
        bench.experts.set_residents([1, 4])
        _, x_TD, routing = bench.step(preferring(0, 5, tokens=tokens))
        scores = bench.experts.importance.scores()
        for rank, expert in enumerate((0, 5)):
            expected = float((x_TD.norm(dim=-1) * routing.weights_TK[:, rank]).sum())
            assert scores[expert] == pytest.approx(expected, rel=1e-5)
        assert sum(score > 0 for score in scores) == 2
        assert bench.experts.use_counts == [tokens * (e in (0, 5)) for e in range(NUM_EXPERTS + 1)]


def test_an_expert_chosen_twice_by_a_token_counts_both_weights(make) -> None:
    for tokens in (1, 2):
        bench = make(2)
        x_TD = torch.ones(tokens, WIDTH)
        ids_TK, weights_TK = torch.tensor([[3, 3]] * tokens), torch.tensor([[0.5, 0.25]] * tokens)
        with torch.inference_mode():
            bench.experts(x_TD, ids_TK, weights_TK)
        expected = tokens * 0.75 * WIDTH**0.5
        assert bench.experts.importance.scores()[3] == pytest.approx(expected, rel=1e-5)


class Life(OverStorage):
    """Random steps in any mode, budget changes, and slow or failing storage."""

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        self.bench = Bench(slots)

    @rule(
        mode=st.sampled_from(["exact", "bounded", "virtual"]),
        prefill=st.sampled_from(["exact", "bounded", "virtual"]),
        residency=st.sampled_from(["manager", "manager", "fixed"]),
        protected=st.integers(0, 2),
        bound=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def change(self, **policy: Any) -> None:
        self.bench.shared.policy = Policy(**policy)

    @rule(
        tokens=st.sampled_from([1, 1, 1, 3, 9]), seed=st.integers(0, 99), prefilling=st.booleans()
    )
    def step(self, tokens: int, seed: int, prefilling: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits_TE = 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator)
        policy, experts = self.bench.shared.policy, self.bench.experts
        mode = policy.prefill if prefilling else policy.mode
        if not self.bench.store.gate.is_set():
            threading.Timer(0.01, self.bench.store.gate.set).start()
        try:
            y_TD, x_TD, routing = self.bench.step(logits_TE, seed=seed, prefilling=prefilling)
        except OSError as error:
            assert str(error) == "storage is gone" and self.bench.store.broken
            return
        assert y_TD.isfinite().all(), "a slot was used before it was whole"
        if mode == "exact":
            torch.testing.assert_close(y_TD, reference(x_TD, routing), rtol=1e-4, atol=1e-4)
        assert (
            experts.slot_table.residents or self.bench.store.broken or policy.residency == "fixed"
        )

    @rule(slots=st.integers(1, NUM_EXPERTS))
    def resize(self, slots: int) -> None:
        self.bench.store.gate.set()
        experts = self.bench.experts
        experts.swaps.settle()
        change = slots - experts.slot_table.num_slots
        for index in experts.slot_table.shrink(max(0, -change)):
            del experts.slots[index]
        for index in experts.slot_table.grow(max(0, change)):
            experts.slots[index] = new_slot()
        self.bench.held = slots + 2
        assert len(experts.slots) == slots

    @rule()
    def fill(self) -> None:
        self.bench.experts.fill()


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
