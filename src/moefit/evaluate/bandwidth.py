"""How fast this machine reads: from storage, past the page cache, and from memory.

Owns the two ceilings of decoding, measured on a checkpoint's own files. Knows nothing of models.

Shapes: R rows, C columns.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_READ = 256 << 20  # bytes of a file, to time storage by


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

    The 384 MiB that it takes are then no part of a budget that this process keeps.
    """
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=torch.set_num_threads, initargs=threads
    ) as apart:
        return apart.submit(measure_bandwidth, folder).result()


def _memory_bandwidth() -> float:
    """A matrix times a vector; on one thread a sum reads a third less."""
    data_RC = torch.ones(384 << 20 >> 15, 1 << 13)  # MiB of float32: caches may be as large as 300
    ones_C = torch.ones(1 << 13)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        data_RC.mv(ones_C)
        best = max(best, data_RC.nbytes / (time.perf_counter() - began))
    return best
