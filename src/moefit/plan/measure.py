"""How each item of a profile is measured.

Owns the way from an item's name to its values, and the full model's output that they are compared
with. Works where the full model does not fit: what does not fit in memory is fetched as it is
needed, exactly, so every result is the same and only slower. Knows nothing of which items there
are, nor of the profile's file.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moefit.errors import BudgetTooSmallError
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.formats.format import parse_format
from moefit.host import available_bytes
from moefit.plan import experiments
from moefit.plan.chosen import compare_quality
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.curves import make_curves
from moefit.plan.experiments import Shapes
from moefit.plan.features import knowledge_of
from moefit.plan.kept import Kept
from moefit.plan.profile import Profile
from moefit.plan.reference import Reference, make_reference, read_reference
from moefit.plan.routes import record_routes
from moefit.plan.running import Subject, fill
from moefit.plan.samples import Steps, measure_steps, measure_wide
from moefit.plan.timing import time_format, time_rest
from moefit.serve.budget import MemoryBudget, format_bytes
from moefit.serve.packed import PackedStore
from moefit.serve.placement import BlockPlacement
from moefit.serve.reckon import ledger
from moefit.serve.served import ServedModel
from moefit.serve.settings import LoadSettings
from moefit.serve.skeleton import Skeleton
from moefit.serve.store import ExpertStore

_REPLAYED = 1024  # tokens whose routes are replayed
_SHARE = 0.75  # of the memory that is free, where no budget is given
_PROMPT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model, and the windows of a text that it is measured on.

    sidecar: the file that the full model's output on them is kept in.
    """

    subject: Subject
    skeleton: Skeleton
    packed: PackedStore
    windows_BT: Tensor
    shapes: Shapes
    sidecar: Path


class Measurements:
    """Of one model, in `memory` bytes; None: in most of what is free.

    Raises BudgetTooSmallError if not even a slot a block fits, which measuring needs.
    """

    def __init__(self, of: Measured, memory: int | None):
        self._of = of
        self._process: int | None = None  # bytes, before anything was loaded
        if memory is not None:
            self._refuse_less(memory)
        self._room = memory or max(1, int(_SHARE * available_bytes()))
        self._reference: Reference | None = None
        self._kept = Kept(of.subject, context=of.windows_BT.shape[1])

    def close(self) -> None:
        """Give back what is kept in memory from one item to the next."""
        self._kept.close()

    def _refuse_less(self, memory: int) -> None:
        """Raise BudgetTooSmallError if not even a slot a block fits, which measuring needs."""
        fewest = uniform(dict.fromkeys(self._of.shapes, 1), "native")
        budget = self._ledger(fewest, None)
        if memory < budget.floor:
            raise BudgetTooSmallError(
                f"{format_bytes(memory)} is too little to measure this model in; give at least "
                f"{budget.floor} bytes ({format_bytes(budget.floor)}), or a shorter --context"
            )

    def measure(self, name: str, profile: Profile) -> Any:
        """The item of this name; profile: with those that were measured before it.

        Raises what loading the model does.
        """
        kind, _, what = name.partition("/")
        if kind != "quality":
            self.close()  # nothing else may be in memory, nor move, while times are taken
        if kind == "bandwidth":
            found = measure_bandwidth(self._of.subject.folder)
            return {"storage": found.storage, "memory": found.memory}
        if kind == "routes":
            return self._routes()
        if kind == "format":
            return self._format(what)
        if kind == "rest":
            return self._rest(what)
        if kind == "models":
            return {"quality": compare_quality(profile, knowledge_of(profile))}
        if kind == "quality":
            loudness = {name: one["loudness"] for name, one in profile.items["routes"].items()}
            configuration = experiments.quality_configuration(what, self._of.shapes, loudness)
            return self._quality(configuration)
        packed = {name for name in experiments.FORMATS if self._is_packed(name)}
        configuration = experiments.stepwise_configuration(what, self._of.shapes, packed)
        if not all(one["rule_known"] for one in profile.items["routes"].values()):
            configuration = replace(configuration, mode="exact")  # no other is possible
        return self._stepwise(configuration)

    def _is_packed(self, format: str) -> bool:
        return all(self._of.packed.has(name, parse_format(format)) for name in self._of.shapes)

    def _routes(self) -> dict[str, Any]:
        """Mass, loudness, curves; the reference is made along the way if it was not."""
        with self._load(self._uniform("native")) as served:
            self._ensure_reference(served)
            count = max(1, _REPLAYED // (self._of.windows_BT.shape[1] - 1))
            routes = record_routes(served, self._of.windows_BT[:count, :-1])
        names = list(self._of.shapes)
        return {
            name: {
                "mass": list(one.mass_E),
                "loudness": list(one.loudness_E),
                "experts": one.experts,
                "rule_known": one.rule_known,
                "curves": make_curves(
                    one, self._of.shapes[name].num_experts, (names.index(name) + 0.5) / len(names)
                ),
            }
            for name, one in routes.items()
        }

    def _format(self, format: str) -> dict[str, Any]:
        store = ExpertStore(
            self._of.skeleton.checkpoint,
            self._of.skeleton.map.experts,
            {block.name: block for block in self._of.skeleton.blocks},
            self._of.packed,
        )
        with self._load(self._uniform(format)) as served:
            return time_format(served, store, self._reference_of(served)).as_dict()

    def _rest(self, format: str) -> dict[str, float]:
        fewest = dict.fromkeys(self._of.shapes, 1)
        with self._load(self._uniform("native", slots=fewest, rest=format)) as served:
            reckoned = served.budget
            return {
                "seconds": time_rest(served, self._reference_of(served)),
                "weights": reckoned.weights,
            }

    def _quality(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        served = self._kept.served(configuration)
        return measure_wide(served, configuration, self._reference_of(served)).as_dict()

    def _stepwise(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        reference = self._reference_or_none()
        with self._load(configuration) as served:
            if reference is None:
                reference = self._reference_of(served)
            fill(served)
            length = self._of.windows_BT.shape[1] - 1 - _PROMPT
            each = min(64, length)
            steps = Steps(windows=2, prompt=_PROMPT, tokens=each)
            return measure_steps(served, configuration, reference, steps).as_dict()

    def _load(self, configuration: Configuration) -> ServedModel:
        return self._of.subject.load(configuration, context=self._of.windows_BT.shape[1])

    def _uniform(self, format: str, **more: Any) -> Configuration:
        experts = {name: shape.num_experts for name, shape in self._of.shapes.items()}
        return self._clamped(uniform(experts, format, **more))

    def _clamped(self, configuration: Configuration) -> Configuration:
        """With as many slots as there is memory for while profiling: exactly as good, if slower."""
        budget = self._ledger(configuration, self._room)
        if budget.planned is None or budget.fixed + budget.planned.nbytes <= self._room:
            return configuration
        return _with_fewer(configuration, self._room - budget.fixed, self._of.shapes)

    def _ledger(self, configuration: Configuration, memory: int | None) -> MemoryBudget:
        """Beside a process as it was at first: a kept model is no part of what another needs."""
        settings = LoadSettings(
            memory=memory,
            context=self._of.windows_BT.shape[1],
            dtype=self._of.subject.dtype,
            placement=configuration.placement,
            rest=configuration.rest,
        )
        budget = ledger(self._of.skeleton, settings, self._of.packed)
        if self._process is None:
            self._process = budget.process
        return replace(budget, process=self._process)

    def _ensure_reference(self, served: ServedModel) -> None:
        if self._reference_or_none() is None:
            made = make_reference(served, self._of.windows_BT)
            self._of.sidecar.parent.mkdir(parents=True, exist_ok=True)
            made.save(self._of.sidecar)
            self._reference = made

    def _reference_or_none(self) -> Reference | None:
        if self._reference is None:
            self._reference = read_reference(self._of.sidecar)
        return self._reference

    def _reference_of(self, served: ServedModel) -> Reference:
        """The full model's output; if its file has gone, it is made again."""
        if (found := self._reference_or_none()) is None:
            with self._load(self._uniform("native")) as full:
                self._ensure_reference(full)
            found = self._reference_or_none()
        assert found is not None, "it has just been made"
        return found


def _with_fewer(configuration: Configuration, room: int, shapes: Shapes) -> Configuration:
    """As many slots in each block as its equal share of `room` holds, one at least.

    Formats by expert need all seats; where they don't fit, the block has its commonest format.
    """
    placement: dict[str, BlockPlacement] = {}
    for name, one in configuration.placement.items():
        format = Counter(one.formats).most_common(1)[0][0]
        share = room // len(shapes) // shapes[name].slot_bytes[format]
        placement[name] = BlockPlacement(slots=max(1, min(one.slots, share)), formats=(format,))
    return replace(configuration, placement=placement)
