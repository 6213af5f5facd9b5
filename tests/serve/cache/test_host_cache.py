import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_served import (
    FAMILIES,
    Disk,
    MemoryStore,
    mixtral_block,
    parts_of,
    reading_through,
    saved,
    tiny,
)
from torch import Tensor

from moefit.errors import CheckpointError
from moefit.quant.format import FORMATS, NativeFormat
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.device_copy import CpuCopies
from moefit.serve.io.loads import Transfer
from moefit.serve.io.reader import ExpertStore

CPU = torch.device("cpu")
BLOCK = "model.layers.0.mlp.experts"
SIZE = NativeFormat().nbytes(mixtral_block()[0].layout.specs)


class Watched(CpuCopies):
    """Counts the bytes of live buffers, and blocks copies while `gate` is not set."""

    def __init__(self):
        self.sizes: list[int] = []
        self.copying = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def buffer(self, size: int) -> Tensor:
        self.sizes.append(size)
        return super().buffer(size)

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        self.copying.release()
        assert self.gate.wait(30)
        super().copy(source_B, target_B)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(*mixtral_block())


@pytest.fixture
def engine() -> Watched:
    return Watched()


def new_slot() -> Slot:
    return allocate_slot(NativeFormat(), mixtral_block()[0].layout.specs, CPU)


def holds(slot: Slot, expert: int) -> bool:
    block, module = mixtral_block()
    expected = parts_of(module, block, expert)
    return all(torch.equal(slot.tensors[short], value) for short, value in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "capacity"), [("native", 1), ("native", 100), ("int4", 3)])
def test_host_cache_returns_same_bytes_as_store(
    tmp_path: Path, family: str, precision: str, capacity: int
) -> None:
    format = FORMATS[precision]
    skeleton = build_skeleton(saved(tiny(family), tmp_path))
    blocks = {block.name: block for block in skeleton.blocks}
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks)
    limit = capacity * max(format.nbytes(block.layout.specs) for block in skeleton.blocks)
    cache = HostCache(store, CpuCopies(), limit=limit)
    wanted = [(block.name, expert) for block in skeleton.blocks for expert in range(8)] * 2
    random.Random(0).shuffle(wanted)
    for block, expert in wanted:
        alone, through = (allocate_slot(format, blocks[block].layout.specs, CPU) for _ in range(2))
        store.read(block, expert, alone)
        cache.read(block, expert, through)
        assert torch.equal(alone.buffer_B, through.buffer_B)
        cache.check()
        assert cache.report()["host_bytes"] <= limit
    report = cache.report()
    assert report["host_hits"] + report["host_reads"] == len(wanted)
    if capacity == 100:
        assert report["host_reads"] == len(wanted) / 2
    cache.close()
    store.close()


class Namer:
    """A store whose experts contain their number, plus 100 if native."""

    def read(self, block: str, expert: int, into: Slot) -> None:
        into.buffer_B.fill_(expert + 100 * (into.format.name == "native"))


def test_expert_in_two_formats_has_two_entries(engine) -> None:
    specs = mixtral_block()[0].layout.specs
    native, packed = (allocate_slot(FORMATS[name], specs, CPU) for name in ("native", "int4"))
    assert packed.nbytes < native.nbytes
    cache = HostCache(Namer(), engine, limit=native.nbytes + packed.nbytes)
    for expert in (3, 3, 4, 3):
        for slot, value in ((native, 100 + expert), (packed, expert)):
            cache.read(BLOCK, expert, slot)
            assert bool((slot.buffer_B == value).all())
            cache.check()
            assert cache.report()["host_bytes"] <= native.nbytes + packed.nbytes


def test_cached_experts_are_not_read_again(store, engine) -> None:
    cache, slot = HostCache(store, engine, limit=3 * SIZE), new_slot()
    for expert in (0, 1, 2, 0, 1, 2):
        cache.read(BLOCK, expert, slot)
        assert holds(slot, expert)
    assert store.reads == [0, 1, 2]
    cache.read(BLOCK, 3, slot)
    cache.read(BLOCK, 1, slot)
    cache.read(BLOCK, 0, slot)
    assert store.reads == [0, 1, 2, 3, 0]


def test_memory_is_allocated_on_demand_and_kept(store, engine) -> None:
    cache = HostCache(store, engine, limit=3 * SIZE + SIZE // 2)
    assert engine.sizes == [] and cache.report()["host_bytes"] == 0
    for expert in range(8):
        cache.read(BLOCK, expert, new_slot())
        assert cache.report()["host_bytes"] == min(expert + 1, 3) * SIZE
    assert engine.sizes == [SIZE] * 3, "a buffer is taken over, not pinned anew"
    cache.close()
    assert cache.report()["host_bytes"] == 0


def test_failed_read_leaves_no_entry(store, engine) -> None:
    cache, slot = HostCache(store, engine, limit=2 * SIZE), new_slot()
    cache.read(BLOCK, 4, slot)
    store.broken = {5}
    for _ in range(3):
        with pytest.raises(OSError, match="storage is gone"):
            cache.read(BLOCK, 5, slot)
        cache.check()
    cache.read(BLOCK, 4, slot)
    assert holds(slot, 4) and store.reads == [4, 5, 5, 5]
    store.broken = set()
    cache.read(BLOCK, 5, slot)
    assert holds(slot, 5) and engine.sizes == [SIZE] * 2


def test_failed_store_read_raises(tmp_path: Path) -> None:
    saved(tiny("Mixtral"), tmp_path)
    with reading_through(Disk()) as disk:
        skeleton = build_skeleton(tmp_path)
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, {})
    cache, slot = HostCache(store, CpuCopies(), limit=SIZE), new_slot()
    disk.failures = 10**6
    with pytest.raises(CheckpointError, match="cannot be read after 3"):
        cache.read(BLOCK, 2, slot)
    disk.failures = 0
    cache.read(BLOCK, 2, slot)
    alone = new_slot()
    store.read(BLOCK, 2, alone)
    assert torch.equal(alone.buffer_B, slot.buffer_B)
    store.close()


def test_allocation_failure_raises_and_next_read_works(store, engine) -> None:
    cache, slot = HostCache(store, engine, limit=2 * SIZE), new_slot()
    cache.read(BLOCK, 0, slot)
    scarce, engine.buffer = engine.buffer, raiser(OSError(12, "Cannot allocate memory"))
    with pytest.raises(OSError, match="Cannot allocate"):
        cache.read(BLOCK, 1, slot)
    cache.check()
    cache.read(BLOCK, 0, slot)
    engine.buffer = scarce
    cache.read(BLOCK, 1, slot)
    assert holds(slot, 1) and store.reads == [0, 1]
    cache.check()


def raiser(error: BaseException):
    def fail(*_: object) -> None:
        raise error

    return fail


def test_concurrent_readers_read_once(store, engine) -> None:
    cache, slots = HostCache(store, engine, limit=2 * SIZE), [new_slot() for _ in range(4)]
    store.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(cache.read, BLOCK, 6, slot) for slot in slots]
        time.sleep(0.1)
        assert not any(read.done() for read in reads)
        cache.check()
        store.gate.set()
        for read in reads:
            read.result(30)
    assert store.reads == [6] and all(holds(slot, 6) for slot in slots)
    assert (cache.report()["host_hits"], cache.report()["host_reads"]) == (3, 1)


def test_next_reader_retries_after_failure(store, engine) -> None:
    cache, slots = HostCache(store, engine, limit=SIZE), [new_slot() for _ in range(3)]
    store.broken, store.error = {6}, OSError("once")
    store.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(cache.read, BLOCK, 6, slot) for slot in slots]
        time.sleep(0.1)
        store.gate.set()
        for read in reads:
            with pytest.raises(OSError, match="once"):
                read.result(30)
    assert store.reads == [6, 6, 6]
    cache.check()


def test_buffer_in_use_is_not_overwritten(store, engine) -> None:
    cache, slots = HostCache(store, engine, limit=SIZE), [new_slot() for _ in range(2)]
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.read, BLOCK, 1, slots[0])
        assert engine.copying.acquire(timeout=30)
        second = pool.submit(cache.read, BLOCK, 2, slots[1])
        time.sleep(0.1)
        assert store.reads == [1], "the other one waits for the buffer"
        cache.check()
        engine.gate.set()
        first.result(30)
        second.result(30)
    assert holds(slots[0], 1) and holds(slots[1], 2)


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_many_readers_share_few_buffers(store, engine, capacity: int) -> None:
    cache = HostCache(store, engine, limit=capacity * SIZE)
    transfer = Transfer(cache, readers=4, engine=engine)
    chance = random.Random(capacity)
    for _ in range(30):
        wanted = [chance.randrange(8) for _ in range(8)]
        store.broken = {chance.randrange(8)}
        slots = [new_slot() for _ in wanted]
        loads = [
            transfer.load(BLOCK, expert, slot, background=chance.random() < 0.3)
            for expert, slot in zip(wanted, slots, strict=True)
        ]
        for expert, slot, load in zip(wanted, slots, loads, strict=True):
            assert load.exception(30) is not None or holds(slot, expert)
            assert cache.report()["host_bytes"] <= capacity * SIZE
        cache.check()
    transfer.close()
    assert sum(engine.sizes) <= capacity * SIZE
