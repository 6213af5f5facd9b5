"""Misses computed in host memory, beside a second device in the same process."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_link import SlowLink
from tiny_served import MemoryStore, mixtral_block
from torch import Tensor

from moefit.errors import ConfigError, DeviceError
from moefit.moe.routing import Routing
from moefit.quant.format import Format, parse_format
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.host_experts import HostExperts, HostSide, HostWork
from moefit.serve.hybrid.measure import TwoSides, measure_costs
from moefit.serve.hybrid.rules import RULES, Rule
from moefit.serve.io.loads import Transfer
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.stats import Counters

NUM_EXPERTS, WIDTH = 8, 32
EVEN = Costs(load=1, gpu=(0, 0), far=(1, 0))


class EncodingStore(MemoryStore):
    """Encodes what it reads, where the slot has a format of its own."""

    def read(self, block: str, expert: int, into: Any) -> None:
        if not into.format.is_encoded:
            return super().read(block, expert, into)
        specs = self._block.layout.specs
        own = allocate_slot(parse_format("native"), specs, torch.device("cpu"))
        super().read(block, expert, own)
        return into.format.encode(into.tensors, own.tensors, specs)


class Layer:
    """One block with slots behind a link, and experts in host memory."""

    def __init__(
        self,
        slots: int,
        rule: str | Rule,
        *,
        places: int = NUM_EXPERTS,
        costs: Costs = EVEN,
        scores: Mapping[int, float] | None = None,
        format: str = "native",
    ):
        self.block, module = mixtral_block()
        self.format: Format = parse_format(format)
        specs = self.block.layout.specs
        self.link, self.store, self.counters = (
            SlowLink(), EncodingStore(self.block, module), Counters(),
        )  # fmt: skip
        self.cache = HostCache(self.store, self.link, limit=places * self.format.nbytes(specs))
        self.transfer = Transfer(self.cache, readers=2, engine=self.link)
        self.table = SlotTable(NUM_EXPERTS, slots, LeastRecentlyUsed())
        device = torch.device("cpu")
        self.slots = {at: allocate_slot(self.format, specs, device) for at in range(slots)}
        self.invoke = ExpertInvoker(
            self.block, self.table, self.slots, self.transfer, self.counters
        )
        chosen = RULES[rule] if isinstance(rule, str) else rule
        self.side = HostSide(self.cache, self.link, costs, chosen)
        self.host = self.invoke.host = HostExperts(self.block, self.side, scores or {})

    def warm(self, experts: range | list[int] = range(NUM_EXPERTS)) -> "Layer":
        for expert in experts:
            self.cache.warm(self.block.name, expert, self.slots[0])
        return self

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        with torch.inference_mode():
            return self.invoke(x_TD, routing)

    def check(self) -> None:
        """Nothing is in use between steps."""
        self.table.check()
        self.cache.check()
        assert not self.table.filling
        assert all(not entry.leases for entry in self.cache._table._entries.values())

    def close(self) -> None:
        self.link.open.set()
        self.transfer.close()
        self.side.close()


@pytest.fixture
def make():
    made: list[Layer] = []

    def layer(*given: Any, **how: Any) -> Layer:
        made.append(Layer(*given, **how))
        return made[-1]

    yield layer
    for one in made:
        one.close()


def case(tokens: int, k: int = 4, *, seed: int = 0, padding: float = 0.0, twice: bool = False):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, WIDTH, generator=generator)
    ids_TK = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(-1)[:, :k].clone()
    if twice:
        ids_TK[:, 1] = ids_TK[:, 0]
    ids_TK[torch.rand(tokens, k, generator=generator) < padding] = NUM_EXPERTS
    return x_TD, Routing(ids_TK, torch.rand(tokens, k, generator=generator))


def alone(x_TD: Tensor, routing: Routing, format: str) -> Tensor:
    """The same on one device that holds every expert."""
    layer = Layer(NUM_EXPERTS, "fetch-all", format=format)
    layer.invoke.host = None
    try:
        return layer(x_TD, routing)
    finally:
        layer.close()


@pytest.mark.parametrize("format", ["native", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 23])
@pytest.mark.parametrize("rule", RULES)
def test_equals_one_device_bit_for_bit(make, rule: str, tokens: int, format: str) -> None:
    layer = make(3, rule, format=format).warm()
    for seed in range(3):
        x_TD, routing = case(tokens, seed=seed)
        assert torch.equal(layer(x_TD, routing), alone(x_TD, routing, format))
        layer.check()
    assert bool(layer.counters.computed_on_host) == (rule != "fetch-all")


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, NUM_EXPERTS),
    places=st.integers(1, NUM_EXPERTS),
    tokens=st.sampled_from([0, 1, 2, 7]),
    number=st.integers(0, NUM_EXPERTS),
    padding=st.sampled_from([0.0, 0.4, 1.0]),
    twice=st.booleans(),
    seed=st.integers(0, 99),
    warm=st.sets(st.integers(0, NUM_EXPERTS - 1)),
)
def test_any_division(slots, places, tokens, number, padding, twice, seed, warm) -> None:
    layer = Layer(slots, lambda _costs, absent, _resident: min(number, len(absent)), places=places)
    layer.warm(sorted(warm))
    warmed = sum(layer.cache.report()[name] for name in ("host_reads", "host_hits"))
    try:
        for step in range(3):
            x_TD, routing = case(tokens, seed=seed + step, padding=padding, twice=twice)
            expected = alone(x_TD, routing, "native")
            assert torch.equal(layer(x_TD, routing), expected)
            layer.check()
    finally:
        layer.close()
    counters = layer.counters
    requests = sum(layer.cache.report()[name] for name in ("host_reads", "host_hits"))
    assert requests - warmed == counters.fetches + counters.computed_on_host


@pytest.mark.parametrize(("places", "computed"), [(1, 0), (2, 1), (3, 2)])
def test_what_the_host_computes_leaves_a_buffer_for_reading(make, places, computed) -> None:
    """Every expert that is read passes through host memory."""
    layer, ended = make(2, "compute-all", places=places).warm(list(range(places))), []
    ids_TK = torch.tensor([[*range(places), 5]])
    routing = Routing(ids_TK, torch.ones(ids_TK.shape))
    x_TD = torch.randn(1, WIDTH)
    thread = threading.Thread(target=lambda: ended.append(layer(x_TD, routing)), daemon=True)
    thread.start()
    thread.join(30)
    assert ended, "the step waits for a buffer for ever"
    assert torch.equal(ended[0], alone(x_TD, routing, "native"))
    assert layer.counters.computed_on_host == computed
    layer.check()


def test_failed_hold_releases_the_others(make, monkeypatch) -> None:
    layer = make(2, "compute-all").warm()
    hold = layer.cache.hold

    def fails(block: str, expert: int, like: Any) -> Any:
        if expert == 3:
            raise MemoryError("no more")
        return hold(block, expert, like)

    monkeypatch.setattr(layer.cache, "hold", fails)
    ids_TK = torch.tensor([[0, 1, 3]])
    with pytest.raises(MemoryError, match="no more"):
        layer(torch.randn(1, WIDTH), Routing(ids_TK, torch.ones(1, 3)))
    layer.check()


def test_what_the_host_computes_enters_no_slot_and_moves_no_weights(make) -> None:
    layer = make(3, "compute-all").warm()
    for seed in range(3):
        layer(*case(5, seed=seed))
    assert not layer.table.residents and layer.link.moved == 0
    assert layer.link.calls == ["to_host", "to_device"] * 3, "one movement each way per step"
    assert layer.counters.fetches == 0 and layer.counters.hit_rate == 0


def test_hottest_are_fetched_and_ties_go_by_recent_use(make) -> None:
    layer = make(2, lambda *_: 2, scores={4: 1.0, 5: 3.0, 6: 2.0}).warm()
    ids_TK = torch.tensor([[1, 4], [1, 5], [1, 6]])
    layer(torch.randn(3, WIDTH), Routing(ids_TK, torch.ones(3, 2)))
    assert set(layer.table.residents) == {1, 5}


def test_residents_and_tokens_are_known_to_the_rule(make) -> None:
    given: list[Any] = []
    layer = make(2, lambda *what: given.append(what[1:]) or 0).warm([0, 1, 2, 3])
    layer(torch.randn(1, WIDTH), Routing(torch.tensor([[7]]), torch.ones(1, 1)))  # not held
    ids_TK = torch.tensor([[0, 1, 7], [0, 1, 7], [0, 2, 6]])  # 7 resident, 6 in storage
    layer(torch.randn(3, WIDTH), Routing(ids_TK, torch.ones(3, 3)))
    assert given[-1] == ([3, 2, 1], [1, 2])
    assert {6, 7} <= set(layer.table.residents), "what host memory does not hold is fetched"


def test_both_sides_work_at_the_same_time(make, monkeypatch) -> None:
    """The host computes while the link is closed, and the copy goes on while the host waits."""
    layer = make(1, lambda *_: 1).warm()
    layer.link.open.clear()
    computed, outputs = threading.Event(), layer.host._executor.outputs

    def notes(*given: Any) -> None:
        assert layer.link.waiting.wait(30), "the copy had not begun"
        outputs(*given)
        computed.set()
        layer.link.open.set()

    monkeypatch.setattr(layer.host._executor, "outputs", notes)
    x_TD, routing = case(1)
    expected = alone(x_TD, routing, "native")
    assert torch.equal(layer(x_TD, routing), expected)
    assert computed.is_set()


def test_reading_begins_once_a_few_residents_are_computed(make, monkeypatch) -> None:
    """Every slot holds an expert of the step; two readers wait for two of them."""
    layer = make(5, "fetch-all").warm()
    rows_TK = torch.tensor([[0, 1], [2, 3], [4, 0]])
    layer(torch.randn(3, WIDTH), Routing(rows_TK, torch.ones(3, 2)))
    assert set(layer.table.residents) == set(range(5))
    executor = layer.invoke._executor
    assert executor is not None
    sizes, outputs = [], executor.outputs

    def noted(x_TD: Tensor, batch: Any, *rest: Any) -> None:
        sizes.append(len(batch))
        if len(sizes) == 2:
            assert layer.link.waiting.wait(30), "nothing is being read"
            layer.link.open.set()
        outputs(x_TD, batch, *rest)

    monkeypatch.setattr(executor, "outputs", noted)
    layer.link.open.clear()
    more_TK = torch.tensor([[0, 1], [2, 3], [4, 6]])
    layer(torch.randn(3, WIDTH), Routing(more_TK, torch.ones(3, 2)))
    assert sizes == ([2, 3, 1] if executor.fused(layer.slots.values()) else [1] * 6)


def test_lost_device_ends_the_host_work(make, monkeypatch) -> None:
    layer, ended = make(2, lambda *_: 2).warm(), []
    outputs = layer.host._executor.outputs

    def slow(x_RD: Tensor, batch: Any, *rest: Any) -> None:
        ended.append(len(batch))
        outputs(x_RD, batch, *rest)

    monkeypatch.setattr(layer.host._executor, "outputs", slow)
    x_TD, routing = case(6)
    layer.link.open.clear()
    threading.Thread(target=lambda: lose(layer.link)).start()
    with pytest.raises(DeviceError, match="disappeared"):
        layer(x_TD, routing)
    layer.check()
    assert not layer.table.residents
    with pytest.raises(DeviceError, match="disappeared"):  # before anything starts
        layer(x_TD, routing)
    layer.check()
    layer.link.lost = False
    assert torch.equal(layer(x_TD, routing), alone(x_TD, routing, "native"))
    layer.check()


def lose(link: SlowLink) -> None:
    assert link.waiting.wait(30)
    link.lost = True
    link.open.set()


def test_cancelled_work_computes_no_further_experts(make, monkeypatch) -> None:
    monkeypatch.setattr("moefit.serve.hybrid.host_experts._TOGETHER", 1)
    layer, calls = make(1, lambda *_: 1).warm(), []
    outputs = layer.host._executor.outputs

    def fails_link(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            layer.link.lost = True
            layer.link.open.set()
            assert cancelled.wait(30), "the step did not cancel"
        outputs(*given)

    cancelled = threading.Event()
    cancel = HostWork.cancel

    def noted(work: HostWork) -> None:
        cancel(work)
        cancelled.set()

    monkeypatch.setattr(HostWork, "cancel", noted)
    monkeypatch.setattr(layer.host._executor, "outputs", fails_link)
    layer.link.open.clear()
    with pytest.raises(DeviceError):
        layer(*case(9))
    assert len(calls) == 1
    layer.check()


def test_failed_host_leaves_everything_usable(make, monkeypatch) -> None:
    layer = make(2, lambda *_: 1).warm()
    x_TD, routing = case(5)

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(layer.host._executor, "outputs", fail)
        with pytest.raises(MemoryError, match="no more"):
            layer(x_TD, routing)
    layer.check()
    assert torch.equal(layer(x_TD, routing), alone(x_TD, routing, "native"))


def test_interrupt_while_waiting_ends_the_work_first(make, monkeypatch) -> None:
    layer = make(1, "compute-all").warm()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moefit.serve.hybrid.host_experts.HostWork.collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer(*case(4))
    layer.check()


def test_slots_of_several_formats_are_fetched(make) -> None:
    layer = make(2, "compute-all").warm()
    other = allocate_slot(parse_format("int8"), layer.block.layout.specs, torch.device("cpu"))
    layer.slots[1] = other
    layer(*case(1, k=1))
    assert layer.counters.fetches == 1 and layer.counters.computed_on_host == 0


def test_measured_costs_are_those_of_the_link() -> None:
    layer = Layer(1, "search").warm()
    try:
        layer.link.rate = layer.slots[0].nbytes / 0.002
        held = [layer.cache.hold(layer.block.name, one, layer.slots[0]) for one in range(4)]
        there = [one.slot for one in held if one is not None]
        sides = TwoSides.of(layer.block, there, layer.slots[0], layer.link, (WIDTH, torch.float32))
        costs = measure_costs(replace(sides, seconds=0.001))
        for one in held:
            assert one is not None
            layer.cache.release(one)
    finally:
        layer.close()
    costs.check()
    assert costs.load >= 0.002 and costs.far[0] > 0 and costs.gpu[0] > 0


def test_error_while_measuring_is_raised() -> None:
    layer = Layer(1, "search").warm([0])
    held = layer.cache.hold(layer.block.name, 0, layer.slots[0])
    assert held is not None
    sides = TwoSides.of(
        layer.block, [held.slot], layer.slots[0], layer.link, (WIDTH, torch.float32)
    )
    layer.link.lost = True
    with pytest.raises(DeviceError):
        measure_costs(sides)
    layer.cache.release(held)
    layer.close()


def test_link_without_bandwidth_is_refused(make) -> None:
    with pytest.raises(ConfigError, match="above zero, or fetch all experts"):
        make(1, "search", costs=replace(EVEN, load=float("inf")))
