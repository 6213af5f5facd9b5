"""Device copies over a simulated torch.cuda; tests marked gpu use a real one."""

import gc
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_served import MemoryStore, mixtral_block, parts_of

from moefit.errors import DeviceError
from moefit.quant.format import NativeFormat
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.io.device_copy import CpuCopies, CudaCopies
from moefit.serve.io.loads import Transfer

MIB = 1 << 20
BLOCK = "model.layers.0.mlp.experts"
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_cpu_copy() -> None:
    engine = CpuCopies()
    source_B, target_B = engine.buffer(4096), torch.zeros(4096, dtype=torch.uint8)
    source_B.fill_(7)
    with engine.ordered():
        engine.copy(source_B, target_B)
    engine.settle()
    assert torch.equal(source_B, target_B)


def test_inference_mode_slot_can_be_filled() -> None:
    engine = CpuCopies()
    with torch.inference_mode():
        target_B = torch.zeros(4096, dtype=torch.uint8)
    engine.copy(engine.buffer(4096).fill_(3), target_B)
    assert int(target_B.sum()) == 3 * 4096


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


class FakeCuda:
    """The part of torch.cuda that copies use; records calls in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[tuple[str, ...]] = []
        self.pinned: dict[int, int] = {}
        self.refuse = 0
        fake, current = self, threading.local()

        class Event:
            made = 0

            def __init__(self, *, blocking: bool = False):
                Event.made += 1
                self.name = f"event{Event.made}"

            def record(self, stream: Any) -> None:
                fake.events.append(("record", self.name, stream.name))

            def synchronize(self) -> None:
                fake.events.append(("wait", self.name))

        class Stream:
            def __init__(self, device: Any = None, name: str = ""):
                self.name = name or f"side of {threading.current_thread().name}"

            def wait_event(self, event: Any) -> None:
                fake.events.append(("order", self.name, event.name))

        @contextmanager
        def stream(one: Stream):
            current.stream = one
            yield
            del current.stream

        main = Stream(name="main")
        fakes = {
            "Event": Event,
            "Stream": Stream,
            "stream": stream,
            "device": lambda device: nullcontext(),
            "current_device": lambda: 1,
            "current_stream": lambda device: getattr(current, "stream", main),
            "synchronize": lambda device: fake.events.append(("settle", str(device))),
            "cudart": lambda: SimpleNamespace(
                cudaHostRegister=self._register, cudaHostUnregister=self._unregister
            ),
        }
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _register(self, address: int, size: int, flags: int) -> int:
        assert flags == 1 and mapped(address) and mapped(address + size - 1)
        if not self.refuse:
            self.pinned[address] = size
        return self.refuse

    def _unregister(self, address: int) -> int:
        assert mapped(address), "its memory must still be there"
        del self.pinned[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_buffers_are_pinned_and_unpinned(cuda: FakeCuda) -> None:
    engine = CudaCopies(torch.device("cuda", 0))
    buffers = [engine.buffer(3 * MIB), engine.buffer(5 * MIB)]
    assert cuda.pinned == {one.data_ptr(): one.nbytes for one in buffers}
    assert sorted(cuda.pinned.values()) == [3 * MIB, 5 * MIB] and engine.pinned
    del buffers[0]
    gc.collect()
    assert list(cuda.pinned.values()) == [5 * MIB]
    buffers.clear()
    gc.collect()
    assert cuda.pinned == {}


def test_pinning_failure_uses_plain_memory(cuda: FakeCuda) -> None:
    cuda.refuse = 2
    engine = CudaCopies(torch.device("cuda", 0))
    buffer_B = engine.buffer(MIB)
    assert not engine.pinned and int(buffer_B.fill_(1).sum()) == MIB
    del buffer_B
    cuda.refuse = 0
    engine.buffer(MIB)
    assert not engine.pinned, "one that is not makes copies wait"


def test_copy_waits_for_computation(
    cuda: FakeCuda,
) -> None:
    engine, store = CudaCopies(torch.device("cuda")), MemoryStore(*mixtral_block())
    block, module = mixtral_block()
    slot = allocate_slot(NativeFormat(), block.layout.specs, torch.device("cpu"))
    transfer = Transfer(HostCache(store, engine, limit=slot.nbytes), readers=1, engine=engine)
    store.gate.clear()
    load = transfer.load(BLOCK, 3, slot)
    assert cuda.events[0] == ("record", "event1", "main"), "at once, where it was asked for"
    store.gate.set()
    load.result(30)
    side = "side of moefit-transfer_0"
    assert cuda.events[1:] == [
        ("order", side, "event1"),
        ("record", "event2", side),
        ("wait", "event2"),
    ]
    assert all(torch.equal(slot.tensors[k], v) for k, v in parts_of(module, block, 3).items())
    transfer.settle()
    assert cuda.events[-1] == ("settle", "cuda:1"), "the device that was current at the beginning"
    transfer.load(BLOCK, 3, slot).result(30)
    assert {event[1] for event in cuda.events if event[0] == "order"} == {side}
    transfer.close()


def test_activations_wait_for_computation(cuda: FakeCuda, monkeypatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    engine, x_TD = CudaCopies(torch.device("cuda")), torch.randn(2, 3)
    ordered = engine.ordered()
    found: list[torch.Tensor] = []

    def move() -> None:
        with ordered:
            found.append(engine.to_host(x_TD))

    thread = threading.Thread(target=move, name="host")
    thread.start()
    thread.join()
    assert torch.equal(found[0], x_TD)
    assert cuda.events == [
        ("record", "event1", "main"),
        ("order", "side of host", "event1"),
        ("record", "event2", "side of host"),
        ("wait", "event2"),
    ]


def test_device_that_disappears_is_named(cuda: FakeCuda, monkeypatch) -> None:
    engine = CudaCopies(torch.device("cuda"))

    def gone(*_: Any) -> None:
        raise RuntimeError("CUDA error: device is lost")

    monkeypatch.setattr(engine, "_copy", gone)
    with pytest.raises(DeviceError, match=r"cuda:1 failed .*device is lost.*--device cpu"):
        engine.copy(engine.buffer(64), torch.zeros(64, dtype=torch.uint8))


@pytest.mark.gpu
@no_gpu
def test_gpu_memory_is_pinned_and_released() -> None:
    engine = CudaCopies(torch.device("cuda"))
    for _ in range(10):  # the same address comes again, and is not registered still
        buffer_B = engine.buffer(3 * MIB)
        assert buffer_B.is_pinned()
        del buffer_B
        gc.collect()
    assert engine.pinned


@pytest.mark.gpu
@no_gpu
def test_gpu_copy_does_not_overtake_computation() -> None:
    engine = CudaCopies(torch.device("cuda"))
    size = 64 * MIB
    slot_B = torch.ones(size, dtype=torch.uint8, device="cuda")
    source_B = engine.buffer(size).fill_(2)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        slot_B.fill_(1)
        for _ in range(10):  # some 10 ms of work in the queue before the slot is read
            busy = (busy @ busy).clamp(-1, 1)
        seen = slot_B.clone()
        ordered = engine.ordered()
        errors: list[BaseException] = []

        def load(ordered: Any = ordered, errors: list[BaseException] = errors) -> None:
            try:
                with ordered:
                    engine.copy(source_B, slot_B)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
        assert not errors
        after = slot_B.clone()
        assert bool((seen == 1).all()) and bool((after == 2).all())


@pytest.mark.gpu
@no_gpu
def test_gpu_slots_equal_store() -> None:
    block, module = mixtral_block()
    engine, store = CudaCopies(torch.device("cuda")), MemoryStore(block, module)
    slots = [
        allocate_slot(NativeFormat(), block.layout.specs, torch.device("cuda")) for _ in range(8)
    ]
    tier = HostCache(store, engine, limit=3 * slots[0].nbytes)
    transfer = Transfer(tier, readers=4, engine=engine)
    for _ in range(10):
        loads = [transfer.load(BLOCK, expert, slot) for expert, slot in enumerate(slots)]
        for expert, load in enumerate(loads):
            load.result(30)
            for short, value in parts_of(module, block, expert).items():
                assert torch.equal(slots[expert].tensors[short].cpu(), value)
        tier.check()
    transfer.close()
    tier.close()
