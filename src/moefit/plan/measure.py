"""Measure the items of a profile.

Loads the model in the configuration of each experiment, reusing the loaded model where possible,
and measures divergence, speed, times of parts and routes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefit.errors import BudgetTooSmallError
from moefit.evaluate.bandwidth import measure_bandwidth
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
    measure_windows,
    read_reference,
)
from moefit.plan.timing import time_dense_weights, time_format
from moefit.plan.trace import Routes, make_curves, make_source_curves, record_routes
from moefit.quant.format import parse_format
from moefit.serve.config import BlockPlacement, LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.load import load_model
from moefit.serve.memory.budget import MemoryBudget, at_least, format_bytes
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import PackedStore
from moefit.serve.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """The model that is profiled.

    Attributes:
        folder: The model's folder.
        dtype: Data type to load it in; None for the checkpoint's own.
        rule: Inference rule of a DS-MoE; None for the model's own.
        device: Where it runs.
    """

    folder: Path
    dtype: torch.dtype | None = None
    rule: str | None = None
    device: str = "cpu"

    def load(
        self, configuration: Configuration, *, context: int, memory: int | None = None
    ) -> ServedModel:
        """Load the model in a configuration.

        Args:
            configuration: How it is served.
            context: Tokens that the KV cache is reserved for.
            memory: The budget in bytes; None for no limit.

        Raises:
            MoefitError: As `moefit.serve.load.load_model` does.
        """
        settings = LoadSettings(
            memory=memory,
            device=self.device,
            context=context,
            dtype=self.dtype,
            generation_config=IGNORE,
            **configuration.load_settings(),
        )
        served = load_model(self.folder, settings, **configuration.policy_settings())
        if self.rule is not None:
            use_rule(served.model, Rule.parse(self.rule))
        return served


def fill_slots(served: ServedModel) -> None:
    """Load the first experts of each block until all slots are full."""
    residents: Mapping[str, range] = {
        name: range(one.slot_table.num_slots) for name, one in served.blocks.items()
    }
    served.set_residents(residents)


class ModelCache:
    """Keeps a loaded model in exact mode from one configuration to the next.

    Where only placements differ, the weights that they share are read once. Reading a model that
    fills the machine takes as long as measuring it.
    """

    def __init__(self, model: MeasuredModel, *, context: int):
        self._model, self._context = model, context
        self._served: ServedModel | None = None
        self._dense_precision = ""

    def served(self, configuration: Configuration) -> ServedModel:
        """Return the model in a configuration; it changes with the next call.

        Raises:
            MoefitError: As `MeasuredModel.load` does.
        """
        assert configuration.mode == "exact", configuration.mode
        if self._served is not None and self._dense_precision == configuration.dense_precision:
            try:
                self._served.set_placement(
                    configuration.placement, memory=None, **configuration.policy_settings()
                )
            except BaseException:
                self.close()
                raise
            return self._served
        self.close()
        self._served = self._model.load(configuration, context=self._context)
        self._dense_precision = configuration.dense_precision
        return self._served

    def close(self) -> None:
        """Close the model and release its memory."""
        if self._served is not None:
            self._served.close()
            self._served = None


_REPLAYED_TOKENS = 1024
_DEFAULT_SHARE = 0.75  # of available memory, without a budget
_PROMPT = 16
_REQUESTS = 8  # of an encoder-decoder, decoded step by step


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementContext:
    """A model and the text that it is measured on.

    Attributes:
        model: The model.
        skeleton: The same model without weights.
        packed: Its packed experts.
        windows: Windows of the text.
        shapes: Its blocks.
        sidecar: File for the full model's output on the windows.
    """

    model: MeasuredModel
    skeleton: Skeleton
    packed: PackedStore
    windows: Windows
    shapes: Shapes
    sidecar: Path


class Measurements:
    """Measures the items of one model's profile.

    Args:
        context: The model and the text.
        memory: Bytes to measure in; None for most of the available memory.

    Raises:
        BudgetTooSmallError: Less than one slot per block fits.
    """

    def __init__(self, context: MeasurementContext, memory: int | None):
        self._context = context
        self._process: int | None = None  # bytes before a model was loaded
        if memory is not None:
            self._check_min_memory(memory)
        self._max_bytes = memory or max(1, int(_DEFAULT_SHARE * available_bytes()))
        self._reference: Reference | None = None
        self._cache = ModelCache(context.model, context=context.windows.context + 1)

    def close(self) -> None:
        """Close the cached model."""
        self._cache.close()

    def _check_min_memory(self, memory: int) -> None:
        """Raise BudgetTooSmallError if less than one slot per block fits."""
        smallest = uniform(dict.fromkeys(self._context.shapes, 1), "native")
        budget = self._estimate(smallest, None)
        if memory < budget.min_bytes:
            raise BudgetTooSmallError(
                f"{format_bytes(memory)} is too little memory to measure this model; give "
                f"{at_least(budget.min_bytes)}, or a shorter "
                "--context"
            )

    def measure(self, name: str, profile: Profile) -> Any:
        """Measure an item.

        Args:
            name: The item, one of `profiler.wanted()`.
            profile: The profile with all items before this one.

        Returns:
            Plain values for JSON.

        Raises:
            MoefitError: As loading the model does.
        """
        kind, _, what = name.partition("/")
        if kind != "quality":
            self.close()  # another model in memory would disturb the times
        if kind == "bandwidth":
            found = measure_bandwidth(self._context.model.folder, torch.get_num_threads())
            return {"storage": found.storage, "memory": found.memory}
        if kind == "routes":
            return self._routes()
        if kind == "format":
            return self._format(what)
        if kind == "rest":
            return self._dense_weights(what)
        if kind == "models":
            return {"quality": compare_quality(profile, features_of(profile))}
        if kind == "quality":
            output_energy = {name: one["loudness"] for name, one in profile.items["routes"].items()}
            configuration = experiments.quality_configuration(
                what, self._context.shapes, output_energy
            )
            return self._quality(configuration)
        packed = {name for name in experiments.FORMATS if self._is_packed(name)}
        configuration = experiments.stepwise_configuration(what, self._context.shapes, packed)
        if not all(one["rule_known"] for one in profile.items["routes"].values()):
            configuration = replace(configuration, mode="exact")  # substitution is impossible
        return self._stepwise(configuration)

    def _is_packed(self, format: str) -> bool:
        return all(
            self._context.packed.has(name, parse_format(format)) for name in self._context.shapes
        )

    def _routes(self) -> dict[str, Any]:
        """Measure shares and curves of experts; create the reference if it does not exist."""
        with self._load(self._uniform("native")) as served:
            self._ensure_reference(served)
            windows = self._context.windows
            count = max(1, _REPLAYED_TOKENS * len(windows) // windows.targets)
            routes = record_routes(served, windows[:count])
        return {
            name: {
                "mass": list(one.mass_E),
                "loudness": list(one.output_energy_E),
                "experts": one.experts,
                "rule_known": one.rule_known,
                "curves": self._curves(name, one),
            }
            for name, one in routes.items()
        }

    def _curves(self, name: str, routes: Routes) -> dict[str, Any]:
        """Return a block's curves; those of an encoder's block by length of the source."""
        names, shape = list(self._context.shapes), self._context.shapes[name]
        depth = (names.index(name) + 0.5) / len(names)
        if not shape.in_encoder:
            return make_curves(routes, shape.num_experts, depth)
        return make_source_curves(routes, shape.num_experts, self._context.windows.source_tokens)

    def _format(self, format: str) -> dict[str, Any]:
        store = ExpertStore(
            self._context.skeleton.checkpoint,
            self._context.skeleton.map.experts,
            {block.name: block for block in self._context.skeleton.blocks},
            self._context.packed,
        )
        with self._load(self._uniform(format)) as served:
            return asdict(time_format(served, store, self._ensured_reference()))

    def _dense_weights(self, format: str) -> dict[str, float]:
        one_slot = dict.fromkeys(self._context.shapes, 1)
        configuration = self._uniform("native", slots=one_slot, dense_precision=format)
        with self._load(configuration) as served:
            decoded, encoded = time_dense_weights(served, self._ensured_reference())
            found = {"seconds": decoded, "weights": served.budget.weights}
            return found | ({"source_token_seconds": encoded} if encoded else {})

    def _quality(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        served = self._cache.served(configuration)
        return measure_windows(served, configuration, self._ensured_reference()).as_dict()

    def _stepwise(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        reference = self._reference_or_none()
        with self._load(configuration) as served:
            if reference is None:
                reference = self._ensured_reference()
            fill_slots(served)
            windows = self._context.windows
            if windows.sources_BS is None:
                steps = Steps(windows=2, prompt=_PROMPT, tokens=min(64, windows.context - _PROMPT))
            else:
                steps = Steps(windows=_REQUESTS, prompt=0, tokens=64)
            return measure_steps(served, configuration, reference, steps).as_dict()

    def _load(self, configuration: Configuration) -> ServedModel:
        return self._context.model.load(configuration, context=self._context.windows.context + 1)

    def _uniform(self, format: str, **more: Any) -> Configuration:
        experts = {name: shape.num_experts for name, shape in self._context.shapes.items()}
        return self._clamped(uniform(experts, format, **more))

    def _clamped(self, configuration: Configuration) -> Configuration:
        """Reduce slots to the available memory, which changes speed but not quality."""
        budget = self._estimate(configuration, self._max_bytes)
        if budget.planned is None or budget.planned_bytes <= self._max_bytes:
            return configuration
        return _with_fewer_slots(
            configuration, self._max_bytes - budget.fixed, self._context.shapes
        )

    def _estimate(self, configuration: Configuration, memory: int | None) -> MemoryBudget:
        """Estimate memory with the process's first size, which excludes a cached model."""
        settings = LoadSettings(
            memory=memory,
            context=self._context.windows.context + 1,
            dtype=self._context.model.dtype,
            placement=configuration.placement,
            dense_precision=configuration.dense_precision,
        )
        budget = memory_budget(self._context.skeleton, settings, self._context.packed)
        if self._process is None:
            self._process = budget.process
        return replace(budget, process=self._process)

    def _ensure_reference(self, served: ServedModel) -> None:
        if self._reference_or_none() is None:
            made = make_reference(served, self._context.windows)
            self._context.sidecar.parent.mkdir(parents=True, exist_ok=True)
            made.save(self._context.sidecar)
            self._reference = made

    def _reference_or_none(self) -> Reference | None:
        if self._reference is None:
            self._reference = read_reference(self._context.sidecar)
        return self._reference

    def _ensured_reference(self) -> Reference:
        """Return the full model's output; create it again if its file is missing."""
        if (found := self._reference_or_none()) is None:
            with self._load(self._uniform("native")) as full:
                self._ensure_reference(full)
            found = self._reference_or_none()
        assert found is not None, "created above"
        return found


def _with_fewer_slots(
    configuration: Configuration, max_bytes: int, shapes: Shapes
) -> Configuration:
    """Limit each block to the slots that an equal share of `max_bytes` holds, at least one.

    A block with formats by expert must be fully resident; if that does not fit, it gets its most
    common format.
    """
    placement: dict[str, BlockPlacement] = {}
    for name, one in configuration.placement.items():
        format = Counter(one.formats).most_common(1)[0][0]
        share = max_bytes // len(shapes) // shapes[name].slot_bytes[format]
        placement[name] = BlockPlacement(slots=max(1, min(one.slots, share)), formats=(format,))
    return replace(configuration, placement=placement)
