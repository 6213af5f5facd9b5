"""A second device in the same process: slots behind a link whose bandwidth is limited."""

import threading
import time
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from moefit.errors import DeviceError
from moefit.serve.io.device_copy import CpuCopies


class SlowLink(CpuCopies):
    """Copies one after the other at so many bytes per second; may be closed, or be lost.

    Attributes:
        open: While it is not set, copies wait.
        waiting: Set once a copy waits.
        lost: The device has disappeared.
        moved: Bytes of experts so far.
        calls: `to_host` and `to_device`, in order.
    """

    def __init__(self, rate: float = 1e12):
        self.rate, self.lost, self.moved = rate, False, 0
        self.calls: list[str] = []
        self.open, self.waiting = threading.Event(), threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def ordered(self) -> AbstractContextManager[None]:
        if self.lost:
            raise DeviceError("device 1 has disappeared")
        return nullcontext()

    def copy(self, source_B: Tensor, target_B: Tensor) -> None:
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(30), "nobody opened the link again"
        with self._lock:
            if self.lost:
                raise DeviceError("device 1 has disappeared")
            began = time.perf_counter()
            super().copy(source_B, target_B)
            self.moved += source_B.nbytes
            time.sleep(max(0.0, source_B.nbytes / self.rate - (time.perf_counter() - began)))

    def to_host(self, x: Tensor) -> Tensor:
        self.calls.append("to_host")
        return x.clone()

    def to_device(self, x: Tensor) -> Tensor:
        self.calls.append("to_device")
        return x.clone()
