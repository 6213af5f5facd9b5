"""Would io_uring read experts faster than threads do, with fewer of the processor's seconds?

    python benchmarks/direct_reads.py FILE [--bytes 6488064] [--rounds 3] [--record]

Direct reads (O_DIRECT) of one expert's size at random places of a large file, such as a packed
store: by threads with `pread`, in C++ and in Python as serving reads (`DirectFile`), and by
io_uring from one thread, whole or in pieces. Methods take turns; medians of the rounds. The file
must not be in a file system in memory. Needs g++ and Linux's headers.
"""

import argparse
import mmap
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record

from moefit.checkpoint.direct_file import ALIGNMENT, DirectFile

SOURCE = Path(__file__).with_suffix(".cpp")
METHODS = (
    *(("threads", width, 1) for width in (1, 2, 4, 8)),
    *(("serving", width, 1) for width in (1, 2, 4)),
    *(("uring", width, 1) for width in (1, 2, 4, 8)),
    *(("uring", width, 4) for width in (1, 2, 4)),
)  # name, reads at once, pieces of each


def as_serving(path: Path, size: int, reads: int, width: int, seed: int) -> tuple[float, float]:
    """Return GB/s and the processor's seconds per GB of threads in Python."""
    size, draw = size // ALIGNMENT * ALIGNMENT, random.Random(seed)
    last = (path.stat().st_size - size) // ALIGNMENT
    places = [draw.randrange(last) * ALIGNMENT for _ in range(reads)]
    with path.open("rb") as file:
        direct = DirectFile(file.fileno())
        buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(width)]

        def read(at: int) -> None:
            for place in places[at::width]:
                assert direct.read(place, buffers[at]) == size, "the file has no direct reads"

        used, began = _used(), time.perf_counter()
        with ThreadPoolExecutor(width) as pool:
            list(pool.map(read, range(width)))
        took, used = time.perf_counter() - began, _used() - used
        direct.close()
    gb = 1e-9 * size * reads
    return gb / took, used / gb


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bytes", type=int, default=6488064, help="an int8 expert of OLMoE")
    parser.add_argument("--reads", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {one: [] for one in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "direct_reads")
        subprocess.run(["g++", "-O2", "-pthread", "-o", program, str(SOURCE)], check=True)
        for number in range(given.rounds):
            for method in random.Random(number).sample(METHODS, len(METHODS)):
                name, width, _ = method
                if name == "serving":
                    one = as_serving(given.file, given.bytes, given.reads, width, number)
                else:
                    order = [program, str(given.file), given.bytes, given.reads, *method, number]
                    done = subprocess.run(
                        list(map(str, order)), capture_output=True, text=True, check=True
                    )
                    one = tuple(float(value) for value in done.stdout.split())
                found[method].append((one[0], one[1]))
    results = [
        {
            "method": name,
            "at_once": width,
            "pieces": pieces,
            "gb_per_second": statistics.median(speed for speed, _ in rounds),
            "processor_seconds_per_gb": statistics.median(used for _, used in rounds),
            "rounds": [speed for speed, _ in rounds],
        }
        for (name, width, pieces), rounds in found.items()
    ]
    for one in results:
        print(one, flush=True)
    if given.record:
        notes = (
            f"Direct reads of {given.bytes} bytes at {given.reads} random places of a file of "
            f"{given.file.stat().st_size} bytes; medians of {given.rounds} "
            "rounds. serving: DirectFile on Python's threads; threads and uring: C++."
        )
        print(record.write("direct-reads", results, notes=notes))


if __name__ == "__main__":
    main()
