"""Model what reading predicted experts early gains, one to four layers ahead, on recorded routing.

    python benchmarks/prefetch_horizon.py mmlu_dev.npz [--slots 12] [--tokens 200] [--record]

A device reads one expert after the other. A layer waits until it has all the experts that its
router chose, and is then computed, for one unit of time. Meanwhile the device, when no layer waits
for it, reads guesses: those of the next layer first, then those of the layers after it, up to the
horizon. A guess that is being read when it turns out wrong is read to its end, or, with "stopped",
ends at once, which reading in pieces could at best do. Slots are least recently used ones, and no
guess displaces what the layer is about to use.

`--times` are times of reading a layer's misses without guesses, in units of a layer's computation.
Guesses find a share of the missing experts, and a share of them is right: one layer ahead as next
routers do on the shipped model, and as better ones might. Both shares fall with the distance as the
recall of probes does in the record probes-2026-11-30. An oracle finds all. With `stolen`, reading
takes that share of the processor's speed from computing while it lasts: 0 with a core to spare, and
about the share of a core that a read needs, divided by the cores, without one.
"""

import argparse
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import record

RECALL = (0.907, 0.832, 0.794, 0.765)  # of probes, one to four layers ahead
# Of missing experts, one layer ahead: share that is found, and share of guesses that are right.
GUESSES = {"oracle": (1.0, 1.0), "measured": (0.54, 0.73), "better": (0.8, 0.8)}
WARM_UP = 30  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is modelled; see the module.

    Attributes:
        horizon: Layers ahead; 0 for no guesses.
        guesses: Which of `GUESSES`.
        read: Time in which the device reads one expert.
        stolen: Share of computing that reading takes.
        slots: Of a layer.
        stops: Whether a guess ends at once when it turns out wrong.
    """

    horizon: int
    guesses: str
    read: float
    stolen: float
    slots: int
    stops: bool = False


@dataclass(slots=True)
class Layer:
    """The slots of a layer.

    Attributes:
        slots: Their number.
        held: When each expert is in memory, least recently used first.
        guessed: Experts that were read for its next token.
        drawn: A random number for each expert, until its next token.
    """

    slots: int
    held: OrderedDict[int, float] = field(default_factory=OrderedDict)
    guessed: set[int] = field(default_factory=set)
    drawn: list[float] = field(default_factory=list)

    def take(self, expert: int, ready: float, kept: Sequence[int]) -> None:
        """Put an expert into a slot; evict the least recently used one that is not kept."""
        if expert not in self.held and len(self.held) >= self.slots:
            others = (one for one in self.held if one not in kept)
            self.held.pop(next(others, next(iter(self.held))))
        self.held[expert] = ready
        self.held.move_to_end(expert)


class Model:
    """A model that decodes a recording.

    Args:
        experts_NLK: Chosen experts by token and layer.
        num_experts: Of a layer.
        setting: What is modelled.
    """

    def __init__(self, experts_NLK: Any, num_experts: int, setting: Setting):
        self._choices = experts_NLK.tolist()
        self._num_experts, self._setting = num_experts, setting
        self._layers = [Layer(setting.slots) for _ in self._choices[0]]
        self._random = random.Random(0)
        self._now = self._free = 0.0  # when the device can begin another read
        self._last = -1, -1  # layer and expert of the last guess
        self.misses = 0

    def run(self) -> float:
        """Return the time per layer after the warm-up."""
        began, layers = 0.0, len(self._layers)
        for token in range(len(self._choices) - 1):
            if token == WARM_UP:
                began, self.misses = self._now, 0
            for layer in range(layers):
                self._compute(token, layer)
        return (self._now - began) / ((len(self._choices) - 1 - WARM_UP) * layers)

    def _compute(self, token: int, layer: int) -> None:
        chosen, slots = self._choices[token][layer], self._layers[layer]
        slots.guessed.clear()
        slots.drawn.clear()
        if self._setting.stops and self._free > self._now:
            of, guess = self._last
            if of == layer and guess not in chosen:
                self._free = self._now
                slots.held.pop(guess, None)
        for expert in chosen:
            ready = slots.held.get(expert)
            if ready is None:
                self.misses += 1
                ready = self._free = max(self._free, self._now) + self._setting.read
            slots.take(expert, ready, chosen)
        self._now = max(self._now, *(slots.held[one] for one in chosen if one in slots.held))
        self._now = self._guess(token, layer, self._now)

    def _guess(self, token: int, layer: int, began: float) -> float:
        """Read guesses while a layer is computed; return when it is complete."""
        end = began + 1.0
        for ahead in range(1, self._setting.horizon + 1):
            at = token * len(self._layers) + layer + ahead
            later, slots = divmod(at, len(self._layers)), self._layers[at % len(self._layers)]
            chosen = self._choices[later[0]][later[1]]
            for expert in self._guesses(chosen, slots, ahead):
                if self._free >= end:
                    return end
                start = max(self._free, began)
                self._free = start + self._setting.read
                end += (min(self._free, end) - start) * self._setting.stolen
                slots.guessed.add(expert)
                self._last = later[1], expert
                slots.take(expert, self._free, chosen)
        return end

    def _guesses(self, chosen: Sequence[int], slots: Layer, ahead: int) -> list[int]:
        missing = [one for one in chosen if one not in slots.held]
        if self._setting.guesses == "oracle":
            return missing
        if not slots.drawn:  # a nearer layer finds what a farther one did, and more
            slots.drawn = [self._random.random() for _ in range(self._num_experts)]
        scale = RECALL[ahead - 1] / RECALL[0]
        found, right = (share * scale for share in GUESSES[self._setting.guesses])
        wrong = found * len(missing) * (1 / right - 1)
        guesses = [one for one in missing if slots.drawn[one] < found]
        others = [one for one in range(self._num_experts) if one not in slots.held]
        others = [one for one in others if one not in chosen]
        guesses += [one for one in others if slots.drawn[one] * len(others) < wrong]
        guesses.sort(key=lambda one: hash((one, slots.drawn[one])))  # right and wrong ones mixed
        return [one for one in guesses if one not in slots.guessed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routing", type=Path)
    parser.add_argument("--slots", type=int, nargs="+", default=[12, 6])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--times", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--stolen", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    experts_NLK = np.load(given.routing)["experts"][: given.tokens].astype(int)
    num_experts = int(experts_NLK.max()) + 1
    results: dict[str, Any] = {}
    for slots, time, stolen in product(given.slots, given.times, given.stolen):
        plain = Model(
            experts_NLK,
            num_experts,
            Setting(horizon=0, guesses="oracle", read=0.0, stolen=0.0, slots=slots),
        )
        plain.run()
        per_layer = plain.misses / ((len(experts_NLK) - 1 - WARM_UP) * experts_NLK.shape[1])
        read = time / per_layer
        speeds: dict[str, float] = {}
        cases = ("oracle", 0, False), *product(GUESSES, (1, 2, 3, 4), (False,))
        for name, horizon, stops in (*cases, ("measured", 1, True), ("better", 1, True)):
            setting = Setting(
                horizon=horizon, guesses=name, read=read, stolen=stolen, slots=slots, stops=stops
            )
            took = Model(experts_NLK, num_experts, setting).run()
            key = f"{name} {horizon}{' stopped' if stops else ''}" if horizon else "off"
            speeds[key] = 1 / took
        name = f"{slots} of {num_experts} slots, reading {time:g}, stolen {stolen:g}"
        gains = {key: speed / speeds["off"] for key, speed in speeds.items()}
        results[name] = {"misses_per_layer": per_layer, "against_off": gains}
        print(name, {key: round(gain, 3) for key, gain in gains.items()}, flush=True)
    if given.record:
        notes = (
            "A model of one device and one layer at a time, no measurement; see the script. "
            "Reading: time of a layer's misses without guesses, in units of its computation. "
            f"Shares found and right one layer ahead: {GUESSES}."
        )
        print(record.write("prefetch-horizon", results, notes=notes))


if __name__ == "__main__":
    main()
