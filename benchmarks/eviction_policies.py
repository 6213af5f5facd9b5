"""Compare eviction policies by hit rate, and with Belady's optimal rule.

Replays the recorded routing of gpt-oss-20b while decoding (4 of 32 experts per layer). Half-lives
are tuned on some sequences, and results reported on others. TRACES contains NAME.npz (experts and
probs [token, layer, k], seq_ptr) and NAME.meta.jsonl (a line per sequence; repetitive ones are
marked `repetition` and skipped).

    python benchmarks/eviction_policies.py TRACES [--save]

Four settings: one or four sequences decoded together, each with caches that persist between
sequences ("continuous", as in a server) or start empty ("cold").
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import record
from cache_simulation import Belady, CacheCount, simulate
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moefit.serve.cache.eviction import (
    POLICIES,
    EvictionPolicy,
    LeastFrequentlyUsed,
    LeastImportant,
    LeastRecentlyUsed,
)

SLOTS = (4, 6, 8, 12, 16, 24)
HALF_LIVES = (4, 8, 12, 16, 24, 32, 64, 128, 256, math.inf)
BATCHES = (1, 4)

Event = dict[int, float]
Sequence = list[list[Event]]  # by layer, by token
Make = Callable[[list[Event]], EvictionPolicy]  # Belady's rule needs the events


class FrequentAndRecent:
    """The decayed count divided by the square root of the tokens since the last use."""

    def __init__(self, half_life_tokens: float) -> None:
        self.now, self.half_life = 0, half_life_tokens
        self.counts: dict[int, tuple[float, int]] = {}  # count at the last use, and its time

    def observe(self, weights, tokens: int = 1) -> None:
        self.now += tokens
        for expert in weights:
            count, then = self.counts.get(expert, (0.0, self.now))
            self.counts[expert] = (1 + count * 2 ** ((then - self.now) / self.half_life), self.now)

    def victim(self, residents, needed) -> int:
        return min(set(residents) - set(needed), key=lambda expert: (self.score(expert), expert))

    def score(self, expert: int) -> float:
        count, then = self.counts.get(expert, (0.0, 0))
        return count * 2 ** ((then - self.now) / self.half_life) / (self.now - then + 1) ** 0.5


def read_sequences(folder: Path, layer_step: int) -> Iterator[Sequence]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            ids_TLK, probs_TLK = arrays["experts"], arrays["probs"].astype(np.float32)
            borders = arrays["seq_ptr"].tolist()
        lines = path.with_name(f"{path.stem}.meta.jsonl").read_text().splitlines()
        for row, (start, end) in zip(map(json.loads, lines), pairwise(borders), strict=True):
            if not row["repetition"]:
                layers = range(layer_step // 2, ids_TLK.shape[1], layer_step)
                yield [
                    [
                        dict(zip(ids, probs, strict=True))
                        for ids, probs in zip(
                            ids_TLK[start:end, layer].tolist(),
                            probs_TLK[start:end, layer].tolist(),
                            strict=True,
                        )
                    ]
                    for layer in layers
                ]


def together(lanes: list[list[Event]]) -> list[Event]:
    """Merge the lanes' events by step, up to the end of the shortest lane."""
    events = []
    for step in zip(*lanes, strict=False):
        union: Event = {}
        for event in step:
            for expert, weight in event.items():
                union[expert] = union.get(expert, 0.0) + weight
        events.append(union)
    return events


def continuous(sequences: list[Sequence], batch: int) -> list[list[Event]]:
    """Return a trace per layer in which each lane of the batch concatenates its sequences."""
    return [
        together([list(chain(*(one[layer] for one in sequences[b::batch]))) for b in range(batch)])
        for layer in range(len(sequences[0]))
    ]


def cold(sequences: list[Sequence], batch: int) -> list[list[Event]]:
    """Return a trace per layer and group of sequences, which ends with its shortest sequence."""
    groups = [sequences[i : i + batch] for i in range(0, len(sequences), batch)]
    return [
        together([one[layer] for one in group])
        for group in groups
        for layer in range(len(sequences[0]))
    ]


def rate(traces: list[list[Event]], slots: int, make: Make) -> float:
    counts = [simulate(events, slots, make(events)) for events in traces]
    return CacheCount(sum(c.hits for c in counts), sum(c.misses for c in counts)).hit_rate


def with_half_life(half_life: float) -> dict[str, Make]:
    return {
        "lfu": lambda _: LeastFrequentlyUsed(half_life),
        "importance": lambda _: LeastImportant(half_life),
        "frequent and recent": lambda _: FrequentAndRecent(half_life),
    }


def lru(_: list[Event]) -> EvictionPolicy:
    return LeastRecentlyUsed()


def scan(sequences: list[Sequence]) -> dict:
    """Return hit rates by batch, policy and half-life, averaged over numbers of slots above K."""
    found = {}
    for batch in BATCHES:
        traces = continuous(sequences, batch)

        def mean(make: Make, traces=traces) -> float:
            return statistics.mean(rate(traces, slots, make) for slots in SLOTS[1:])

        found[f"batch {batch}"] = {
            "lru": mean(lru),
            **{
                name: {str(h): mean(with_half_life(h)[name]) for h in HALF_LIVES}
                for name in with_half_life(1)
            },
        }
    return found


def best_half_lives(scanned: dict) -> dict[str, float]:
    """Return the best half-life of each policy for single sequences."""
    rates = {
        name: by_half_life for name, by_half_life in scanned["batch 1"].items() if name != "lru"
    }
    return {name: float(max(found, key=found.__getitem__)) for name, found in rates.items()}


def measure(sequences: list[Sequence], makes: dict[str, Make]) -> dict:
    settings = {
        f"batch {batch}, {how.__name__}": how(sequences, batch)
        for batch in BATCHES
        for how in (continuous, cold)
    }
    return {
        setting: {
            "experts per step": statistics.mean(len(event) for event in chain(*traces)),
            "steps beyond the slots": {
                str(slots): statistics.mean(len(event) > slots for event in chain(*traces))
                for slots in SLOTS
            },
            "hit rates": {
                name: {str(slots): rate(traces, slots, make) for slots in SLOTS}
                for name, make in makes.items()
            },
        }
        for setting, traces in settings.items()
    }


def differences(sequences: list[Sequence], makes: dict[str, Make], slots: int) -> dict:
    """Return the mean difference of hit rates to LRU's over cold sequences, with its error."""
    traces = [cold([one], 1) for one in sequences]
    base = [rate(one, slots, makes["lru"]) for one in traces]
    found = {}
    for name, make in makes.items():
        gains = [rate(t, slots, make) - b for t, b in zip(traces, base, strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        found[name] = {"mean": statistics.mean(gains), "standard error": error}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--tuning", type=int, default=24, help="sequences for the half-lives")
    parser.add_argument("--testing", type=int, default=64, help="sequences for the report")
    parser.add_argument("--layer-step", type=int, default=4, help="use every Nth layer")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    sequences = list(read_sequences(options.traces, options.layer_step))
    order = np.random.default_rng(0).permutation(len(sequences)).tolist()
    tuning = [sequences[i] for i in order[: options.tuning]]
    testing = [sequences[i] for i in order[options.tuning :][: options.testing]]
    scanned = scan(tuning)
    half_lives = best_half_lives(scanned)
    makes = {
        "lru": lru,
        **{name: with_half_life(half_life)[name] for name, half_life in half_lives.items()},
        "belady": Belady,
    }
    results = {
        "sequences": {"usable": len(sequences), "tuning": len(tuning), "testing": len(testing)},
        "layers": len(sequences[0]),
        "tokens tested": sum(len(one[0]) for one in testing),
        "half-lives scanned": scanned,
        "half-lives": half_lives,
        "settings": measure(testing, makes),
        "gain on lru at 8 slots, by sequence": differences(testing, makes, slots=8),
    }
    report(results)
    if options.save:
        notes = (
            "One decision per step and layer over the batch's union of experts; a step with more "
            "experts than slots runs in waves, for which Belady's rule is not proven optimal. "
            "gpt-oss-20b decoding, mostly MMLU, without repetitive sequences. With 4 slots, top-4 "
            "leaves no choice. Half-lives are tuned with continuous caches, over other numbers of "
            "slots."
        )
        path = record.write("eviction-policies", results, notes=notes, suffix="gpt-oss-20b")
        draw(results, path.with_suffix(".png"))
        print(path)


def report(results: dict) -> None:
    console = Console(width=120)
    table = Table(title="mean hit rate by half-life in tokens, %, tuning sequences")
    for name in ("", "lru", *map(str, HALF_LIVES)):
        table.add_column(name, justify="right")
    for setting, rates in results["half-lives scanned"].items():
        for name in with_half_life(1):
            cells = [rates["lru"], *rates[name].values()]
            table.add_row(f"{setting}, {name}", *(f"{100 * cell:.2f}" for cell in cells))
    console.print(table)
    for setting, found in results["settings"].items():
        title = f"hit rate, %: {setting}; {found['experts per step']:.1f} experts a step"
        table = Table("slots", *map(str, SLOTS), title=title)
        for name, rates in found["hit rates"].items():
            table.add_row(name, *(f"{100 * value:.2f}" for value in rates.values()))
        beyond = found["steps beyond the slots"].values()
        table.add_row("steps beyond", *(f"{100 * share:.0f}" for share in beyond), style="dim")
        console.print(table)
    for name, gain in results["gain on lru at 8 slots, by sequence"].items():
        mean, error = gain["mean"], gain["standard error"]
        print(f"8 slots, {name}: {100 * mean:+.2f} ± {100 * error:.2f} points on lru")


def draw(results: dict, path: Path) -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {name: f"C{i}" for i, name in enumerate([*POLICIES, "belady"])}
    for setting, style in (("batch 1", "o-"), ("batch 4", "s--")):
        rates = results["settings"][f"{setting}, continuous"]["hit rates"]
        bound = np.array(list(rates["belady"].values()))
        for name, colour in colours.items():
            ys = np.array(list(rates[name].values()))
            label = f"{name}, {setting}"
            if name != "importance":  # it would cover lfu
                left.plot(SLOTS, 100 * ys, style, color=colour, ms=4, lw=1, label=label)
            if name != "belady":
                misses = (1 - ys) / (1 - bound)
                middle.plot(SLOTS, misses, style, color=colour, ms=4, lw=1, label=label)
    slots = {"xlabel": "slots, of 32 experts", "xticks": SLOTS}
    left.set(**slots, ylabel="hit rate, %", title="Hits, continuous caches")
    middle.set(**slots, title="Misses, as a multiple of Belady's")
    finite = [h for h in HALF_LIVES if h < math.inf]
    for setting, style in (("batch 1", "o-"), ("batch 4", "s--")):
        scanned = results["half-lives scanned"][setting]
        for name in ("lfu", "importance"):
            ys = [100 * (scanned[name][str(h)] - scanned["lru"]) for h in finite]
            label = f"{name}, {setting}"
            right.plot(finite, ys, style, color=colours[name], ms=4, lw=1, label=label)
    right.set(
        xscale="log", xlabel="half-life, tokens", title="Tuning: mean hit rate above LRU's, points"
    )
    right.set_xticks(finite, labels=list(map(str, finite)), minor=False)
    right.minorticks_off()
    right.axhline(0, color=colours["lru"], lw=1)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
