"""Copying an expert's bytes from host memory into a slot, in order with the computation.

Owns what differs between devices: host memory that a device can copy from, the stream of a copying
thread, and who waits for whom. Knows nothing of experts, files or tables.

On a GPU the computation runs behind the program. A slot that the program has given up may still be
read by work in the queue, so a copy waits, on the device, for what was queued when its load was
asked for; and the copying thread waits for its copy, so that whoever computes once the load is done
finds the slot whole without a word between streams.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from moefit.serve.cache.slot import host_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts


class CopyEngine(Protocol):
    """One device's way of copying. Thread-safe. `pinned`: whether all buffers so far are."""

    pinned: bool

    def buffer(self, size: int) -> Tensor:
        """Host memory to copy from; it goes back to the system with the last reference."""
        ...

    def ordered(self) -> AbstractContextManager[None]:
        """Made by who computes, entered by who copies: copies in it touch no slot before the
        computation that was asked for until now is done with it.
        """
        ...

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """Returns when the target is whole and the source may be overwritten."""
        ...

    def settle(self) -> None:
        """Wait until the device has done all that it was asked for."""
        ...


class CpuCopies:
    """Slots are host memory, and nothing runs behind the program."""

    pinned = False

    def buffer(self, size: int) -> Tensor:
        """Memory as a slot's own."""
        return host_bytes(size)

    def ordered(self) -> AbstractContextManager[None]:
        """What was asked for is done."""
        return nullcontext()

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """A plain copy."""
        with torch.inference_mode():  # the slot may have been made in it
            target_B.copy_(source_B)

    def settle(self) -> None:
        """Nothing is under way."""


class CudaCopies:
    """A side stream for each copying thread, from pinned memory.

    `pinned` turns False, for good, when the system refuses to pin a buffer; copies from such a one
    are right, but slow, and hold the thread.
    """

    def __init__(self, device: torch.device):
        # Threads begin on device 0, whichever is current where the model was loaded.
        number = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", number)
        self._own = threading.local()
        self.pinned = True

    def buffer(self, size: int) -> Tensor:
        """Pinned where it lies.

        torch's own pinned allocator rounds sizes up to powers of two and keeps what is freed; both
        would break a bound in bytes.
        """
        buffer_B = host_bytes(size)
        address = buffer_B.data_ptr()
        with torch.cuda.device(self._device):
            failed = int(_runtime().cudaHostRegister(address, size, _PORTABLE))
        if failed:
            self.pinned = False
        else:
            weakref.finalize(buffer_B, _unpin, address).atexit = False
        return buffer_B

    def ordered(self) -> AbstractContextManager[None]:
        """Copies in it wait for the work that is in the caller's stream now."""
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return self._behind(computed)

    @contextmanager
    def _behind(self, computed: torch.cuda.Event) -> Iterator[None]:
        self._stream().wait_event(computed)
        yield

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """One transfer on the thread's stream, waited for."""
        stream = self._stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            target_B.copy_(source_B, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # spinning would take a core from computing
            done.record(stream)
        done.synchronize()

    def settle(self) -> None:
        """All streams of the device."""
        torch.cuda.synchronize(self._device)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return self._own.stream


def _unpin(address: int) -> None:
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    """The CUDA runtime's functions; a build of torch without CUDA has none."""
    return torch.cuda.cudart()
