"""Run routing through a rule: times, bytes moved, hits and prefetching, layer by layer.

Each layer has slots on the GPU. Fetched experts enter them and evict by moefit's own policies; what
the far side computes does not. Prefetching uses the link while the layer before is computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.rules import Rule, layer_time
from moefit.simulate.costs import ExpertShape
from moefit.simulate.routing import Ids, demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Slots on the GPU, and guesses.

    Attributes:
        slots: Per layer; 0 for none.
        eviction: Name of the policy.
        recall: Share of a layer's absent experts that are guessed while the layer before is
            computed; 0 for no prefetching. As many guesses are wrong as are missed.
        seed: Of the guesses.
    """

    slots: int = 0
    eviction: str = DEFAULT_POLICY
    recall: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Sums over all steps.

    Attributes:
        seconds: Of all layers; `gpu`, `far` of each side, `between` of what is outside of experts.
        gpu: Seconds in which the GPU loads and computes.
        far: Seconds of the far side.
        between: Seconds of layers beyond their experts.
        layers: Layers computed.
        tokens: Tokens computed.
        wanted: Experts wanted, one for each layer and step.
        resident: How many of them were on the GPU.
        prefetched: How many arrived before they were wanted.
        fetched: How many were fetched when they were wanted.
        wasted: Experts that were prefetched and not wanted.
        weight_bytes: Bytes of weights over the link.
        token_bytes: Bytes of activations over the link.
    """

    seconds: float = 0.0
    gpu: float = 0.0
    far: float = 0.0
    between: float = 0.0
    layers: int = 0
    tokens: int = 0
    wanted: int = 0
    resident: int = 0
    prefetched: int = 0
    fetched: int = 0
    wasted: int = 0
    weight_bytes: float = 0.0
    token_bytes: float = 0.0

    def __add__(self, other: "Outcome") -> "Outcome":
        names = self.__slots__
        return Outcome(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Simulation:
    """The layers of a model with their slots.

    Args:
        costs: Of an expert.
        shape: Of the model.
        rule: Divides the absent experts of a layer.
        cache: Slots and guesses.
    """

    def __init__(self, costs: Costs, shape: ExpertShape, rule: Rule, cache: Cache):
        self._costs, self._shape, self._rule, self._cache = costs, shape, rule, cache
        self._policies = [POLICIES[cache.eviction]() for _ in range(shape.layers)]
        self._tables = [SlotTable(shape.experts, cache.slots, one) for one in self._policies]
        self._random = Random(cache.seed)
        self._idle = 0.0  # seconds for which the link was idle in the last layer

    def run(self, steps: Iterable[Ids]) -> Outcome:
        """Return the sums over steps, ids_TLK each."""
        total = Outcome()
        for ids_TLK in steps:
            self._idle = 0.0  # the first layer's experts are not guessed
            for layer in range(self._shape.layers):
                total += self.layer(layer, demand(ids_TLK[:, layer]))
            total += Outcome(tokens=len(ids_TLK))
        return total

    def layer(self, layer: int, tokens: dict[int, int]) -> Outcome:
        """Compute one layer and move its experts.

        Args:
            layer: Its number.
            tokens: Tokens of each expert that is wanted.
        """
        costs, table = self._costs, self._tables[layer]
        self._policies[layer].observe({expert: float(n) for expert, n in tokens.items()}, 1)
        resident = [one for one in tokens if one in table.residents]
        absent = sorted(tokens.keys() - set(resident), key=lambda one: (-tokens[one], one))
        arrived, wasted = self._prefetched(absent)
        order = [*arrived, *(one for one in absent if one not in arrived)]
        late = [tokens[one] for one in order[len(arrived) :]]
        there = [tokens[one] for one in (*resident, *arrived)]
        number = self._rule(costs, late, there)
        gpu, far = layer_time(costs, late, there, number)
        for expert in order[: len(arrived) + number]:
            self._enter(table, expert, set(tokens))
        seconds = max(gpu, far)
        self._idle = max(0.0, seconds - number * costs.load) + costs.between
        loaded = number + len(arrived) + wasted
        return Outcome(
            seconds=seconds + costs.between,
            gpu=gpu,
            far=far,
            between=costs.between,
            layers=1,
            wanted=len(tokens),
            resident=len(resident),
            prefetched=len(arrived),
            fetched=number,
            wasted=wasted,
            weight_bytes=loaded * self._shape.expert_bytes,
            token_bytes=sum(late[number:]) * self._shape.token_bytes,
        )

    def _prefetched(self, absent: Sequence[int]) -> tuple[list[int], int]:
        """Return the absent experts that have arrived, and how many others have.

        As many experts are guessed as are absent, the hottest first, while the link was idle.
        """
        recall, load = self._cache.recall, self._costs.load
        room = int(self._idle / load) if recall and load else 0
        arrived, wasted = list[int](), 0
        for expert in absent[:room]:
            if self._random.random() < recall:
                arrived.append(expert)
            else:
                wasted += 1
        return arrived, wasted

    @staticmethod
    def _enter(table: SlotTable, expert: int, wanted: set[int]) -> None:
        """Let an expert into a slot, unless all are taken by experts of this layer's step."""
        slot = table.reserve(expert, wanted)
        if slot is not None:
            table.publish(slot)
