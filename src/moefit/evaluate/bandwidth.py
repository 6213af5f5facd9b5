"""Measure the bandwidths of storage and memory, in a process of its own.

What the measurement takes is in no memory budget, so that process imports numpy and no torch, and
takes at most half of the memory that is free. `python -m moefit.evaluate.bandwidth FILE` runs it.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moefit.errors import ConfigError
from moefit.folders import is_gguf
from moefit.host import available_bytes

_READ = 256 << 20  # bytes of a file, to time storage by
_LEAST, _MOST = 384 << 20, 4 << 30  # bytes of memory, to time it by
_COLUMNS = 1 << 13
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second, from storage with a cold page cache and from memory."""

    storage: float
    memory: float


def measure_bandwidth(folder: Path, threads: int) -> Bandwidth:
    """Return the bandwidths of the storage that a model is on, and of memory.

    Args:
        folder: With the model's safetensors files, or its GGUF file.
        threads: Number of threads that read memory; one thread alone reads less.

    Raises:
        ConfigError: The measuring process failed.
    """
    files = [folder] if is_gguf(folder) else folder.glob("*.safetensors")
    file = max(files, key=lambda path: path.stat().st_size)
    done = subprocess.run(
        [sys.executable, "-m", "moefit.evaluate.bandwidth", str(file)],
        env={**os.environ, **dict.fromkeys(_THREADS, str(threads))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"measuring bandwidths ended with exit code {done.returncode}: "
            f"{done.stderr.strip()[-300:] or 'no message; the system may be out of memory'}"
        )
    return Bandwidth(**json.loads(done.stdout))


def _storage_bandwidth(file: Path) -> float:
    """Read part of a file past the page cache."""
    size = min(_READ, file.stat().st_size)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(8 << 20)
        began, done = time.perf_counter(), 0
        while done < size and (count := os.preadv(descriptor, [buffer], done)):
            done += count
        seconds = time.perf_counter() - began
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return done / seconds


def _memory_bandwidth() -> float:
    """Multiply a matrix with a vector; a sum reads a third less on one thread."""
    rows = max(1, _timed_bytes() // (4 * _COLUMNS))
    data_RC = np.ones((rows, _COLUMNS), dtype=np.float32)
    ones_C = np.ones(_COLUMNS, dtype=np.float32)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        _ = data_RC @ ones_C
        best = max(best, data_RC.nbytes / (time.perf_counter() - began))
    return best


def _timed_bytes() -> int:
    """Return the bytes of memory to time.

    They exceed the caches, since a smaller matrix gives too high a figure, but not half of what the
    machine and its control groups have free, since the process would be killed.
    """
    wanted = max(_LEAST, 2 * _cache_bytes(Path("/sys/devices/system/cpu")))
    return min(wanted, _MOST, available_bytes() // 2)


def _cache_bytes(folder: Path) -> int:
    """Return the bytes of the last-level caches of the processors that this process may run on.

    Some servers have more than a GiB of them, in many parts. 0 if the system does not report them.
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


if __name__ == "__main__":
    found = Bandwidth(storage=_storage_bandwidth(Path(sys.argv[1])), memory=_memory_bandwidth())
    json.dump(asdict(found), sys.stdout)
