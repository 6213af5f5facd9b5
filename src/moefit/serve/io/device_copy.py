"""Copy experts from host memory into slots, and activations both ways, in order with computing.

A `CopyEngine` hides what differs between devices: host memory that a device can copy from, streams
of the copying threads, and synchronization.

On a GPU the computation runs asynchronously, and queued kernels may still read the slot of an
evicted expert. So a copy waits, on the device, for all work queued when its load was requested. The
copying thread in turn waits for the copy, so a completed load needs no further synchronization.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from moefit.errors import DeviceError, in_brief
from moefit.serve.cache.slot import host_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts


class CopyEngine(Protocol):
    """Copies to one device. Thread-safe. `pinned`: whether all buffers so far are pinned."""

    pinned: bool

    def buffer(self, size: int) -> Tensor:
        """Return host memory to copy from, unmapped with the last reference."""
        ...

    def ordered(self) -> AbstractContextManager[None]:
        """Return a context for copies that wait for the computation requested so far.

        Call this on the computing thread, and enter the context on the copying thread.
        """
        ...

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """Copy, and return when the target is complete and the source may be overwritten."""
        ...

    def to_host(self, x: Tensor) -> Tensor:
        """Return a tensor's values in host memory, complete.

        Call this on a copying thread, within a context from `ordered`.
        """
        ...

    def to_device(self, x: Tensor) -> Tensor:
        """Return values from host memory on the device, in order with the caller's computation."""
        ...

    def settle(self) -> None:
        """Wait until the device has completed all requested work."""
        ...


class CpuCopies:
    """Copies within host memory, where computation is synchronous."""

    pinned = False

    def buffer(self, size: int) -> Tensor:
        """Return host memory as for a slot."""
        return host_bytes(size)

    def ordered(self) -> AbstractContextManager[None]:
        """Return an empty context: the computation is already complete."""
        return nullcontext()

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """Copy on the calling thread."""
        with torch.inference_mode():  # the slot may have been allocated in it
            target_B.copy_(source_B)

    def to_host(self, x: Tensor) -> Tensor:
        """Return the tensor: it is in host memory."""
        return x

    def to_device(self, x: Tensor) -> Tensor:
        """Return the tensor: the host is the device."""
        return x

    def settle(self) -> None:
        """Return at once: nothing runs asynchronously."""


class CudaCopies:
    """Copies from pinned host memory to a GPU, on one stream per copying thread.

    `pinned` becomes False when the system refuses to pin a buffer. Copies from such a buffer are
    correct, but slow, and block the thread.
    """

    def __init__(self, device: torch.device):
        # New threads start on device 0, even if another device was current while loading.
        number = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", number)
        self._own = threading.local()
        self.pinned = True

    def buffer(self, size: int) -> Tensor:
        """Return host memory that is pinned in place.

        torch's pinned allocator rounds sizes up to powers of two and caches freed memory; either
        would exceed a limit in bytes.
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
        """Return a context whose copies wait for the work now in the caller's stream."""
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return self._behind(computed)

    @contextmanager
    def _behind(self, computed: torch.cuda.Event) -> Iterator[None]:
        self._stream().wait_event(computed)
        yield

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        """Copy on the thread's stream, and wait for it."""
        with _device_errors(self._device):
            self._copy(source_B, target_B)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        stream = self._stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # no busy waiting
            done.record(stream)
        done.synchronize()

    def to_host(self, x: Tensor) -> Tensor:
        """Copy to pinned memory on the thread's stream, and wait for it."""
        with _device_errors(self._device):
            # torch's pinned allocator, since these tensors are small and change in size.
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy(x, host)
        return host

    def to_device(self, x: Tensor) -> Tensor:
        """Copy on the caller's stream; torch reuses pinned memory only once it has been read."""
        with _device_errors(self._device):
            return x.pin_memory().to(self._device, non_blocking=True)

    def settle(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self._device)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return self._own.stream


@contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Raise errors of the device, such as one that has disappeared, as DeviceError.

    Too little memory is no such error: the device is still there.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DeviceError(
            f"{device} failed while experts or activations were copied ({in_brief(error)}); start "
            "again once it is back, or serve on another device, such as --device cpu"
        ) from error


def _unpin(address: int) -> None:
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    """Return the CUDA runtime's functions; a build of torch without CUDA has none."""
    return torch.cuda.cudart()
