"""How fast this machine reads: from storage, past the page cache, and from memory.

Owns the two ceilings of decoding, measured on a checkpoint's own files. Knows nothing of models.

Shapes: R rows, C columns.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_READ = 256 << 20  # bytes of a file, to time storage by
_LEAST, _MOST = 384 << 20, 4 << 30  # bytes of memory, to time it by


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second, from storage with a cold page cache and from memory."""

    storage: float
    memory: float


def measure_bandwidth(folder: Path) -> Bandwidth:
    """Read part of the largest file past the page cache; multiply a matrix larger than caches."""
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = min(_READ, file.stat().st_size)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(8 << 20)
        began, done = time.perf_counter(), 0
        while done < size and (count := os.preadv(descriptor, [buffer], done)):
            done += count
        storage = done / (time.perf_counter() - began)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return Bandwidth(storage=storage, memory=_memory_bandwidth())


def bandwidth_apart(folder: Path) -> Bandwidth:
    """`measure_bandwidth` in a process of its own, with as many threads as this one has.

    The memory that it takes, 384 MiB or more, is then no part of a budget that this process keeps.
    """
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=torch.set_num_threads, initargs=threads
    ) as apart:
        return apart.submit(measure_bandwidth, folder).result()


def _memory_bandwidth() -> float:
    """A matrix times a vector; on one thread a sum reads a third less."""
    nbytes = min(max(_LEAST, 2 * _cache_bytes(Path("/sys/devices/system/cpu"))), _MOST)
    data_RC = torch.ones(nbytes >> 15, 1 << 13)
    ones_C = torch.ones(1 << 13)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        data_RC.mv(ones_C)
        best = max(best, data_RC.nbytes / (time.perf_counter() - began))
    return best


def _cache_bytes(folder: Path) -> int:
    """The last-level caches of the processors that this process may run on, together.

    Some servers have more than a GiB of them, in many parts. 0 if the system does not say.
    """
    found: dict[tuple[str, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        with suppress(OSError, ValueError):
            parts = (folder / f"cpu{cpu}" / "cache").glob("index*")
            last = max(parts, key=lambda part: int((part / "level").read_text()))
            size = (last / "size").read_text().strip()
            shared = (last / "shared_cpu_list").read_text()
            found[last.name, shared] = int(size.removesuffix("K")) << 10
    return sum(found.values())
