"""Measure the items of a profile.

Loads the model in the configuration of each experiment, reusing the loaded model where it can, and
measures divergence, speed, times of parts and routes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefit.errors import BudgetTooSmallError
from moefit.evaluate.speed import measure_bandwidth
from moefit.host import available_bytes
from moefit.moe.routing import Rule
from moefit.plan import experiments
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.experiments import Shapes
from moefit.plan.fitting import features_of
from moefit.plan.profile import Profile
from moefit.plan.quality import compare_quality
from moefit.plan.reference import (
    Reference,
    Steps,
    make_reference,
    measure_steps,
    measure_wide,
    read_reference,
)
from moefit.plan.timing import time_format, time_rest
from moefit.plan.trace import make_curves, record_routes
from moefit.quant.format import parse_format
from moefit.serve.config import BlockPlacement, LoadSettings
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.load import load_model
from moefit.serve.memory.budget import MemoryBudget, at_least, format_bytes
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import PackedStore


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What is planned for. dtype None: the checkpoint's own; rule None: the model's own."""

    folder: Path
    dtype: torch.dtype | None = None
    rule: str | None = None
    device: str = "cpu"

    def load(
        self, configuration: Configuration, *, context: int, memory: int | None = None
    ) -> ServedModel:
        """The model, so served. Raises what `moefit.serve.load.load_model` does."""
        settings = LoadSettings(
            memory=memory,
            device=self.device,
            context=context,
            dtype=self.dtype,
            **configuration.load_settings(),
        )
        served = load_model(self.folder, settings, **configuration.policy_settings())
        if self.rule is not None:
            use_rule(served.model, Rule.parse(self.rule))
        return served


def fill(served: ServedModel) -> None:
    """Load experts until every slot is taken, the first ones of each block."""
    residents: Mapping[str, range] = {
        name: range(one.slot_table.num_slots) for name, one in served.blocks.items()
    }
    served.set_residents(residents)


class ModelCache:
    """One exactly served model, kept from one configuration to the next.

    Where only placements differ, what they have in common is then read once: of a model that fills
    a machine, reading takes as long as measuring.
    """

    def __init__(self, subject: MeasuredModel, *, context: int):
        self._subject, self._context = subject, context
        self._served: ServedModel | None = None
        self._rest = ""

    def served(self, configuration: Configuration) -> ServedModel:
        """The model, so served until the next is asked for. Raises what `Subject.load` does."""
        assert configuration.mode == "exact", configuration.mode
        if self._served is not None and self._rest == configuration.rest:
            try:
                self._served.set_placement(
                    configuration.placement, memory=None, **configuration.policy_settings()
                )
            except BaseException:
                self.close()
                raise
            return self._served
        self.close()
        self._served = self._subject.load(configuration, context=self._context)
        self._rest = configuration.rest
        return self._served

    def close(self) -> None:
        """Give its memory back."""
        if self._served is not None:
            self._served.close()
            self._served = None


_REPLAYED = 1024  # tokens whose routes are replayed
_SHARE = 0.75  # of the memory that is free, where no budget is given
_PROMPT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementContext:
    """A model, and the windows of a text that it is measured on.

    sidecar: the file that the full model's output on them is kept in.
    """

    subject: MeasuredModel
    skeleton: Skeleton
    packed: PackedStore
    windows_BT: Tensor
    shapes: Shapes
    sidecar: Path


class Measurements:
    """Of one model, in `memory` bytes; None: in most of what is free.

    Raises BudgetTooSmallError if not even a slot a block fits, which measuring needs.
    """

    def __init__(self, of: MeasurementContext, memory: int | None):
        self._of = of
        self._process: int | None = None  # bytes, before anything was loaded
        if memory is not None:
            self._refuse_less(memory)
        self._room = memory or max(1, int(_SHARE * available_bytes()))
        self._reference: Reference | None = None
        self._kept = ModelCache(of.subject, context=of.windows_BT.shape[1])

    def close(self) -> None:
        """Give back what is kept in memory from one item to the next."""
        self._kept.close()

    def _refuse_less(self, memory: int) -> None:
        """Raise BudgetTooSmallError if not even a slot a block fits, which measuring needs."""
        fewest = uniform(dict.fromkeys(self._of.shapes, 1), "native")
        budget = self._ledger(fewest, None)
        if memory < budget.min_bytes:
            raise BudgetTooSmallError(
                f"{format_bytes(memory)} is too little to measure this model in; give "
                f"{at_least(budget.min_bytes)}, or a shorter "
                "--context"
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
            return {"quality": compare_quality(profile, features_of(profile))}
        if kind == "quality":
            output_energy = {name: one["loudness"] for name, one in profile.items["routes"].items()}
            configuration = experiments.quality_configuration(what, self._of.shapes, output_energy)
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
                "loudness": list(one.output_energy_E),
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
            dense_precision=configuration.rest,
        )
        budget = memory_budget(self._of.skeleton, settings, self._of.packed)
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
