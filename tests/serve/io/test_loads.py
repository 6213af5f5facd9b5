import threading
import time

import pytest
import torch
from tiny_served import MemoryStore, mixtral_block, parts_of

from moefit.quant.format import NativeFormat
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.io.loads import Transfer, end_all


@pytest.fixture
def store():
    return MemoryStore(*mixtral_block())


@pytest.fixture
def transfer(store):
    transfer = Transfer(store, readers=2)
    yield transfer
    store.gate.set()
    transfer.close()


def new_slot() -> Slot:
    return allocate_slot(NativeFormat(), mixtral_block()[0].layout.specs, torch.device("cpu"))


def holds(slot: Slot, expert: int) -> bool:
    block, module = mixtral_block()
    expected = parts_of(module, block, expert)
    return all(torch.equal(slot.tensors[short], value) for short, value in expected.items())


def test_loads_fill_slots_and_report_time(transfer) -> None:
    slots = [new_slot() for _ in range(8)]
    loads = [transfer.load("model.layers.0.mlp.experts", e, slots[e]) for e in range(8)]
    assert all(0 <= load.result(30) < 30 for load in loads)
    assert all(holds(slot, expert) for expert, slot in enumerate(slots))


def test_loads_run_in_background(transfer, store) -> None:
    store.gate.clear()
    slot = new_slot()
    load = transfer.load("model.layers.0.mlp.experts", 3, slot)
    time.sleep(0.05)
    assert not load.done()
    store.gate.set()
    load.result(30)
    assert holds(slot, 3)


def test_readers_limit_concurrent_loads(transfer, store) -> None:
    store.gate.clear()
    for expert in range(6):
        transfer.load("model.layers.0.mlp.experts", expert, new_slot())
    mine = [t for t in threading.enumerate() if t.name.startswith("moefit-transfer")]
    assert len(mine) == transfer.readers == 2


def test_demand_loads_do_not_queue_behind_background_loads(transfer, store) -> None:
    store.gate.clear()
    slots = [new_slot() for _ in range(7)]
    late = [
        transfer.load("model.layers.0.mlp.experts", e, slots[e], background=True) for e in range(6)
    ]
    urgent = transfer.load("model.layers.0.mlp.experts", 6, slots[6])
    assert poll(urgent.running)
    assert late[-1].cancel(), "background loads queue"
    store.gate.set()
    urgent.result(30)
    assert holds(slots[6], 6)


def poll(condition) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    "error", [OSError("gone"), MemoryError("full"), SystemExit(3), KeyboardInterrupt("ctrl")]
)
def test_read_errors_reach_caller(transfer, store, error: BaseException) -> None:
    store.broken, store.error = {0, 1, 2, 3}, error
    loads = [transfer.load("model.layers.0.mlp.experts", e, new_slot()) for e in range(4)]
    for load in loads:
        with pytest.raises(type(error), match=str(error)):
            load.result(30)
    slot = new_slot()
    transfer.load("model.layers.0.mlp.experts", 5, slot).result(30)
    assert holds(slot, 5)


def test_close_finishes_running_loads_and_cancels_the_others(transfer, store) -> None:
    store.gate.clear()
    slots = [new_slot() for _ in range(5)]
    loads = [transfer.load("model.layers.0.mlp.experts", e, slots[e]) for e in range(5)]
    while sum(load.running() for load in loads) < 2:
        time.sleep(0.001)
    threading.Timer(0.05, store.gate.set).start()
    transfer.close()
    assert [load.cancelled() for load in loads] == [False, False, True, True, True]
    assert holds(slots[0], 0) and holds(slots[1], 1)
    with pytest.raises(RuntimeError):
        transfer.load("model.layers.0.mlp.experts", 0, new_slot())
    transfer.close()


@pytest.mark.parametrize("background", [False, True])
def test_failed_loads_are_counted(transfer, store, background: bool) -> None:
    store.broken = {2}
    name = "model.layers.0.mlp.experts"
    with pytest.raises(OSError, match="storage is gone"):
        transfer.load(name, 2, new_slot(), background=background).result(30)
    failures = transfer.failures
    assert (failures.demand, failures.background) == ((0, 1) if background else (1, 0))
    assert failures.failing and transfer.loads == 0


@pytest.mark.parametrize("panic", [OSError("gone"), SystemExit(3), GeneratorExit()])
def test_cancelled_loads_end(panic: BaseException) -> None:
    ended = []

    def fail() -> None:
        ended.append("failed")
        raise panic

    end_all([fail, lambda: ended.append("well"), fail])
    assert ended == ["failed", "well", "failed"]


def test_interrupt_during_cancellation_is_raised_at_end() -> None:
    ended = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_all([interrupt, lambda: ended.append("well")])
    assert ended == ["well"]
