"""Compare reading experts with sequential reads of the same size from the same drive.

    moefit pack MODEL                                   # codes of a quantised checkpoint, or
    moefit pack MODEL --formats int4-nearest            # with --precision int4-nearest
    python benchmarks/read_speed.py MODEL [--precision native] [--rounds 9] [--record NAME]

Experts are read in a random order into slots, as serving reads them: from the checkpoint's own
files, and from the packed store. Beside each stand plain sequential reads of as many bytes a
request from the same files, past the page cache (O_DIRECT) into memory that is aligned to pages.
All are done in turn in every round, in another order each time, by one thread and by as many as
serving uses; ratios are of one round. The aim is at least 0.8.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import record
import torch

from moefit.checkpoint.direct_file import ALIGNMENT
from moefit.checkpoint.safetensors import bytes_of
from moefit.evaluate.loading import locate
from moefit.plan.timing import drop_page_cache
from moefit.quant.format import Format, parse_format
from moefit.serve.cache.slot import Slot, allocate_slot, host_bytes
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.packed.store import open_packed

Reads = Sequence[Callable[[], int]]
"""What one thread after the other takes up; each returns the bytes that it read."""


@dataclass(frozen=True)
class Place:
    """Where experts are read from: a store, its files, and the bytes of one expert."""

    store: ExpertStore
    files: tuple[Path, ...]
    request: int


class Slots:
    """A slot for each thread, of the format in which a block is read."""

    def __init__(self, format: Format):
        self._format, self._own = format, local()

    def of(self, specs: Any) -> Slot:
        """Return the calling thread's slot."""
        if getattr(self._own, "specs", None) is not specs:
            self._own.slot = allocate_slot(self._format, specs, torch.device("cpu"))
            self._own.specs = specs
        return self._own.slot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", default="native", help="format of slots")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, default=48, help="read in each round, by each way")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, LoadSettings().readers])
    parser.add_argument("--record", metavar="NAME", help="write a record with this in its name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # readers are threads of their own
    folder = locate(arguments.model)
    skeleton, format = build_skeleton(folder), parse_format(arguments.precision)
    places = places_of(skeleton, format)
    results = {
        f"{threads} threads": measured(skeleton, format, places, threads, arguments)
        for threads in arguments.threads
    }
    found = {
        "model": folder.name,
        "precision": format.name,
        "expert_bytes": {name: place.request for name, place in places.items()},
        "experts_a_round": arguments.experts,
        "rounds": arguments.rounds,
        **results,
    }
    if arguments.record:
        print(record.write("read-speed", found, notes=NOTES, suffix=arguments.record))


NOTES = (
    "GB/s: medians over rounds, after one in which files are opened; checksums of packed experts "
    "are verified before. share: the median of a round's rate over that of sequential reads in the "
    "same round."
)


def places_of(skeleton: Skeleton, format: Format) -> dict[str, Place]:
    """Return the ways of reading experts: "own files", and "packed" if there is a store."""
    blocks = {block.name: block for block in skeleton.blocks}

    def place(formats: list[Format]) -> Place:
        packed = open_packed(skeleton, formats)
        store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks, packed)
        files = {path for block in blocks for path in store.files(block, format)}
        first = skeleton.blocks[0]
        own = skeleton.map.experts[first.name][0].nbytes
        request = format.nbytes(first.layout.specs) if formats else own
        return Place(store, tuple(sorted(files)), request)

    places = {"own files": place([])}
    if all(open_packed(skeleton, [format]).has(name, format) for name in blocks):
        packed = places["packed"] = place([format])
        slots = Slots(format)
        for block in skeleton.blocks:  # verifies checksums, as the first read of each expert does
            for expert in range(block.num_experts):
                packed.store.read(block.name, expert, slots.of(block.layout.specs))
    else:
        print(f"not packed in {format.name}: run moefit pack")
    return places


def measured(
    skeleton: Skeleton, format: Format, places: dict[str, Place], threads: int, arguments: Any
) -> dict[str, Any]:
    """Return the rates of all ways of reading, and their shares of sequential reads."""
    rates: dict[str, list[float]] = {}
    slots = Slots(format)
    ways: dict[str, Callable[[random.Random], Reads]] = {}
    for name, place in places.items():
        ways[name] = partial(experts, skeleton, place, slots, arguments.experts)
        ways[f"sequential, {name}"] = partial(sequential, place, arguments.experts)
    for number in range(arguments.rounds + 1):
        chance = random.Random(number)
        for name in chance.sample(list(ways), len(ways)):
            drop_page_cache(path for place in places.values() for path in place.files)
            rate = timed(ways[name](chance), threads)
            if number:  # in the first round files are opened
                rates.setdefault(name, []).append(rate / 1e9)
    found = {name: summary(rates[name], rates[f"sequential, {name}"]) for name in places}
    for name, one in found.items():
        print(f"{threads} threads, {name}: {one}", flush=True)
    return found


def summary(rates: Sequence[float], sequential_rates: Sequence[float]) -> dict[str, Any]:
    """Return medians of rates and of their ratios, with all rates."""
    shares = [one / other for one, other in zip(rates, sequential_rates, strict=True)]
    return {
        "GB/s": round(statistics.median(rates), 3),
        "sequential GB/s": round(statistics.median(sequential_rates), 3),
        "share": round(statistics.median(shares), 3),
        "shares": [round(one, 3) for one in shares],
        "all GB/s": [round(one, 3) for one in rates],
        "all sequential GB/s": [round(one, 3) for one in sequential_rates],
    }


def experts(
    skeleton: Skeleton, place: Place, slots: Slots, count: int, chance: random.Random
) -> Reads:
    """Return reads of different experts in random order."""
    every = [(block, expert) for block in skeleton.blocks for expert in range(block.num_experts)]

    def read(block: Any, expert: int) -> int:
        place.store.read(block.name, expert, slots.of(block.layout.specs))
        return place.request

    return [partial(read, *one) for one in chance.sample(every, min(count, len(every)))]


def sequential(place: Place, count: int, chance: random.Random) -> Reads:
    """Return reads of consecutive ranges of one file, and of the next ones at its end."""
    size = -(-place.request // ALIGNMENT) * ALIGNMENT
    own = local()

    def read(path: Path, offset: int) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = bytes_of(host_bytes(size))
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(file, [own.buffer], offset)
        finally:
            os.close(file)

    ranges = list(_ranges(place.files, size))
    first = chance.randrange(len(ranges))
    return [partial(read, *ranges[(first + i) % len(ranges)]) for i in range(count)]


def _ranges(files: Sequence[Path], size: int) -> Iterator[tuple[Path, int]]:
    for path in files:
        whole = path.stat().st_size // size
        yield from ((path, number * size) for number in range(whole))


def timed(reads: Reads, threads: int) -> float:
    """Return the bytes per second of all reads together."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: time.sleep(0.01), range(threads)))  # threads exist
        began = time.perf_counter()
        done = sum(pool.map(lambda read: read(), reads))
        return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
