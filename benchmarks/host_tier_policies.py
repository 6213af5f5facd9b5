"""Compare eviction policies of the host cache, which receives the misses of a GPU's slots.

Replays the recorded routing of gpt-oss-20b while decoding (4 of 32 experts in each of 24 layers)
through slots with the default eviction. Their misses go, over all layers in order, through a host
cache with a share of all experts: moefit's policy, least recently used, and Belady's optimal rule.
The half-life is tuned on some sequences, and results reported on others. TRACES contains NAME.npz
(experts [token, layer, k], seq_ptr) and NAME.meta.jsonl (a line per sequence; repetitive ones are
marked `repetition` and skipped).

    python benchmarks/host_tier_policies.py TRACES [--save]
"""

import argparse
import heapq
import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import record
from rich.console import Console
from rich.table import Table

from moefit.serve.cache import host_cache
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.host_cache import HostTable
from moefit.serve.cache.slot_table import SlotTable

EXPERTS = 32
SLOTS = (6, 12, 20)
SHARES = (0.125, 0.25, 0.5, 0.75)
HALF_LIVES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

Expert = tuple[int, int]  # layer, number


def read_sequences(folder: Path, count: int) -> list[np.ndarray]:
    """Return `count` random sequences, ids_TLK each."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        lines = path.with_name(f"{path.stem}.meta.jsonl").read_text().splitlines()
        found += [(path, row) for row, line in enumerate(lines)
                  if not json.loads(line)["repetition"]]  # fmt: skip
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]
    sequences = {}
    for path in sorted({path for path, _ in chosen}):
        with np.load(path) as arrays:
            ids, borders = arrays["experts"], list(pairwise(arrays["seq_ptr"].tolist()))
        for one in chosen:
            if one[0] == path:
                sequences[one] = ids[slice(*borders[one[1]])]
    return [sequences[one] for one in chosen]


def misses(sequences: list[np.ndarray], slots: int) -> list[Expert]:
    """Return the misses of slots that persist between sequences, in order."""
    layers = range(sequences[0].shape[1])
    policies = [POLICIES[DEFAULT_POLICY]() for _ in layers]
    tables = [SlotTable(EXPERTS, slots, policy) for policy in policies]
    asked = []
    for ids_LK in (step for ids_TLK in sequences for step in ids_TLK.tolist()):
        for layer in layers:
            policies[layer].observe(dict.fromkeys(ids_LK[layer], 1.0))
            for expert in ids_LK[layer]:
                if expert not in tables[layer].residents:
                    slot = tables[layer].reserve(expert, protected=ids_LK[layer])
                    assert slot is not None
                    tables[layer].publish(slot)
                    asked.append((layer, expert))
    return asked


def shipped(asked: list[Expert], places: int, half_life: float | None = None) -> float:
    with mock.patch.object(host_cache, "HALF_LIFE", half_life or host_cache.HALF_LIFE):
        table = HostTable(places)
        for expert in asked:
            lease = table.lease(expert, 1)
            assert lease is not None
            if lease.fresh:
                table.complete(lease)
            table.release(lease)
    return table.hits / len(asked)


def lru(asked: list[Expert], places: int) -> float:
    held: dict[Expert, None] = {}
    hits = 0
    for expert in asked:
        if expert in held:
            hits += 1
            del held[expert]
        elif len(held) == places:
            del held[next(iter(held))]
        held[expert] = None
    return hits / len(asked)


def belady(asked: list[Expert], places: int) -> float:
    following, next_use = [0] * len(asked), {}
    for now in range(len(asked) - 1, -1, -1):
        following[now] = next_use.get(asked[now], len(asked))
        next_use[asked[now]] = now
    held: dict[Expert, int] = {}
    order: list[tuple[int, Expert]] = []  # of evictions; stale entries are skipped
    hits = 0
    for now, expert in enumerate(asked):
        hits += expert in held
        while expert not in held and len(held) == places:
            use, victim = heapq.heappop(order)
            if held.get(victim) == -use:
                del held[victim]
        held[expert] = following[now]
        heapq.heappush(order, (-following[now], expert))
    return hits / len(asked)


def measure(sequences: list[np.ndarray], policies: dict) -> dict:
    """Return the hit rate of the host cache by slots, share of experts and policy."""
    tokens, layers = sum(map(len, sequences)), sequences[0].shape[1]
    found = {}
    for slots in SLOTS:
        asked = misses(sequences, slots)
        rates = {
            str(share): {
                name: policy(asked, round(share * EXPERTS * layers))
                for name, policy in policies.items()
            }
            for share in SHARES
        }
        found[str(slots)] = {"misses a token": len(asked) / tokens, "found": rates}
    return {"tokens": tokens, "slots": found}


def show(results: dict, title: str) -> None:
    names = list(results["slots"][str(SLOTS[0])]["found"][str(SHARES[0])])
    table = Table("slots", "misses a token", "held", *names, title=title)
    for slots, one in results["slots"].items():
        for share, rates in one["found"].items():
            values = (f"{100 * rates[name]:.1f}" for name in names)
            table.add_row(slots, f"{one['misses a token']:.1f}", f"{float(share):.1%}", *values)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--tuning", type=int, default=8, help="sequences for the half-life")
    parser.add_argument("--testing", type=int, default=16, help="sequences for the report")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    sequences = read_sequences(options.traces, options.tuning + options.testing)
    scanned = {
        str(h): lambda asked, places, h=h: shipped(asked, places, half_life=h) for h in HALF_LIVES
    }
    tuning = measure(sequences[: options.tuning], {"lru": lru, **scanned})
    show(tuning, "found in the host tier, %, by half-life in requests an expert; tuning")
    compared = {"lru": lru, "shipped": shipped, "belady": belady}
    testing = measure(sequences[options.tuning :], compared)
    show(testing, "found in the host tier, %")
    if options.save:
        notes = (
            "Slots and host cache persist between sequences. `found` is the share of the slots' "
            "misses that the host cache holds, by the share of all experts that it can hold. "
            "Nothing is resident at the beginning, so the first use of each expert counts as not "
            "found. Simulated, without a GPU."
        )
        results = {"half-lives scanned": tuning, "half-life": host_cache.HALF_LIFE,
                   "compared": testing}  # fmt: skip
        print(record.write("host-tier-policies", results, notes=notes, suffix="gpt-oss-20b"))


if __name__ == "__main__":
    main()
