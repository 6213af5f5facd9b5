import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import MemoryStore, mixtral_block
from torch import Tensor

from moefit.moe.experts import expert_weights, reference_experts
from moefit.moe.routing import Routing
from moefit.quant.format import NativeFormat
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import Transfer
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.stats import Counters

NUM_EXPERTS, WIDTH = 8, 32


@dataclass
class Bench:
    """An invoker with its slots and store."""

    invoke: ExpertInvoker
    slot_table: SlotTable
    slots: dict[int, Slot]
    store: MemoryStore
    counters: Counters
    policy: LeastRecentlyUsed

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        self.policy.observe(dict.fromkeys(used(routing), 1.0))
        with torch.inference_mode():
            y_TD = self.invoke(x_TD, routing)
        self.slot_table.check()
        assert not self.slot_table.filling
        return y_TD


@pytest.fixture
def make():
    transfers: list[Transfer] = []

    def bench(slots: int, *, readers: int = 2) -> Bench:
        block, module = mixtral_block()
        store, counters, policy = MemoryStore(block, module), Counters(), LeastRecentlyUsed()
        slot_table = SlotTable(NUM_EXPERTS, slots, policy)
        memory = {
            index: allocate_slot(NativeFormat(), block.layout.specs, torch.device("cpu"))
            for index in range(slots)
        }
        transfers.append(Transfer(store, readers=readers))
        invoke = ExpertInvoker(block, slot_table, memory, transfers[-1], counters)
        return Bench(invoke, slot_table, memory, store, counters, policy)

    yield bench
    for transfer in transfers:
        transfer.close()


def used(routing: Routing) -> set[int]:
    return set(routing.ids_TK.flatten().tolist()) - {NUM_EXPERTS}


def random_case(tokens: int, k: int, *, seed: int = 0, padding: float = 0.0, twice: bool = False):
    """Tokens and a routing whose padding ids have weights, which must not count."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, WIDTH, generator=generator)
    order_TE = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(-1)
    ids_TK = order_TE[:, :k].clone()
    if twice and k > 1:
        ids_TK[:, 1] = ids_TK[:, 0]
    ids_TK[torch.rand(tokens, k, generator=generator) < padding] = NUM_EXPERTS
    return x_TD, Routing(ids_TK, torch.rand(tokens, k, generator=generator))


def reference(x_TD: Tensor, routing: Routing) -> Tensor:
    with torch.no_grad():
        return reference_experts(x_TD, routing, expert_weights(mixtral_block()[1]))


@pytest.mark.parametrize("slots", range(1, NUM_EXPERTS + 1))
@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_equals_reference_at_any_number_of_slots(make, slots: int, tokens: int) -> None:
    bench = make(slots)
    for seed in range(4):
        x_TD, routing = random_case(tokens, 3, seed=seed)
        torch.testing.assert_close(bench(x_TD, routing), reference(x_TD, routing))
    assert bench.counters.fetches == len(bench.store.reads)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, NUM_EXPERTS),
    tokens=st.sampled_from([0, 1, 2, 7]),
    k=st.integers(1, NUM_EXPERTS),
    padding=st.sampled_from([0.0, 0.4, 1.0]),
    twice=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_and_duplicates(slots, tokens, k, padding, twice, seed: int) -> None:
    block, module = mixtral_block()
    policy, store = LeastRecentlyUsed(), MemoryStore(block, module)
    slot_table = SlotTable(NUM_EXPERTS, slots, policy)
    memory = {
        i: allocate_slot(NativeFormat(), block.layout.specs, torch.device("cpu"))
        for i in range(slots)
    }
    transfer = Transfer(store, readers=2)
    invoke = ExpertInvoker(block, slot_table, memory, transfer, Counters())
    bench = Bench(invoke, slot_table, memory, store, Counters(), policy)
    x_TD, routing = random_case(tokens, k, seed=seed, padding=padding, twice=twice)
    try:
        y_TD = bench(x_TD, routing)
    finally:
        transfer.close()
    torch.testing.assert_close(y_TD, reference(x_TD, routing))


def test_result_does_not_depend_on_residents(make) -> None:
    x_TD, routing = random_case(9, 3)
    results = []
    for slots in (1, 2, 5, 8):
        bench = make(slots)
        results += [bench(x_TD, routing), bench(x_TD, routing)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tokens", [1, 4])
def test_result_has_dtype_of_tokens(make, tokens: int) -> None:
    x_TD, routing = random_case(tokens, 2)
    wide = Routing(routing.ids_TK, routing.weights_TK.double())
    assert make(3)(x_TD, wide).dtype == torch.float32


def test_resident_experts_are_not_read(make) -> None:
    bench = make(NUM_EXPERTS)
    x_TD, routing = random_case(6, 3)
    bench(x_TD, routing)
    assert sorted(bench.store.reads) == sorted(used(routing))
    bench(x_TD, routing)
    assert len(bench.store.reads) == len(used(routing))
    assert (bench.counters.hits, bench.counters.fetches) == (len(used(routing)), len(used(routing)))


def test_accesses_count_steps_and_experts(make) -> None:
    bench = make(4)
    x_TD, _ = random_case(5, 1)
    bench(x_TD, Routing(torch.full((5, 1), 2), torch.ones(5, 1)))
    assert (bench.counters.hits, bench.counters.fetches) == (0, 1)


def test_needed_residents_are_used_before_eviction(make) -> None:
    bench = make(2)
    x_TD, _ = random_case(1, 1)
    bench(x_TD, Routing(torch.tensor([[4, 6]]), torch.ones(1, 2)))
    bench(x_TD, Routing(torch.tensor([[1, 6, 2, 4]]), torch.ones(1, 4)))
    assert sorted(bench.store.reads[:2]) == [4, 6] and sorted(bench.store.reads[2:]) == [1, 2]


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("broken", [{0}, {3, 5}, set(range(NUM_EXPERTS))])
def test_failed_read_keeps_slot_table_valid(
    make, slots: int, tokens: int, broken: set[int]
) -> None:
    bench = make(slots)
    x_TD = random_case(tokens, 1)[0]
    ids_TK = torch.arange(NUM_EXPERTS).expand(tokens, -1)
    routing = Routing(ids_TK, torch.ones(ids_TK.shape))
    bench.store.broken = broken
    with pytest.raises(OSError, match="storage is gone"):
        bench(x_TD, routing)
    bench.slot_table.check()
    assert not bench.slot_table.filling and not set(bench.slot_table.residents) & broken
    assert bench.slot_table.num_slots == slots
    bench.store.broken = set()
    torch.testing.assert_close(bench(x_TD, routing), reference(x_TD, routing))


def test_interrupt_keeps_filling_slots(make) -> None:
    bench = make(1, readers=1)
    x_TD, _ = random_case(1, 1)
    bench.store.gate.clear()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not bench.slot_table.filling:
            time.sleep(0.001)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        bench.store.gate.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            bench(x_TD, Routing(torch.tensor([[2]]), torch.ones(1, 1)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert bench.store.reads == [2], "the read has ended"
    bench.slot_table.check()
    assert bench.slot_table.empty == 1
    routing = Routing(torch.tensor([[3]]), torch.ones(1, 1))
    torch.testing.assert_close(bench(x_TD, routing), reference(x_TD, routing))


def test_wait_time_is_counted(make) -> None:
    bench = make(1)
    read = bench.store.read

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        read(*arguments)

    bench.store.read = slowly
    began = time.perf_counter()
    bench(random_case(1, 1)[0], Routing(torch.tensor([[2]]), torch.ones(1, 1)))
    assert 0.05 < bench.counters.wait_seconds <= time.perf_counter() - began
