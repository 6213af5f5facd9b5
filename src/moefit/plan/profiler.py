"""Measures a model on a machine: the order of things, resumable.

Owns which items there are, and that each is written before the next begins. Works where the full
model does not fit: what does not fit in `memory` is fetched as it is needed, exactly, so every
result is the same and only slower.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moefit.errors import BudgetTooSmallError, UnsupportedModelError
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.folders import alone_in
from moefit.formats.error import expected_error
from moefit.formats.format import FORMATS as ALL_FORMATS
from moefit.formats.format import NATIVE, parse_format, weights_in
from moefit.moe.routing import Rule
from moefit.plan import experiments
from moefit.plan.calibration import digest_of
from moefit.plan.chosen import compare_quality
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.curves import make_curves
from moefit.plan.experiments import Shapes
from moefit.plan.features import knowledge_of
from moefit.plan.profile import (
    VERSION,
    BlockFacts,
    Profile,
    ProfileFacts,
    machine,
    path_for,
    profiles_root,
    read_profile,
    write_profile,
)
from moefit.plan.reference import Reference, make_reference, read_reference
from moefit.plan.routes import record_routes
from moefit.plan.running import Subject, fill
from moefit.plan.samples import Steps, measure_steps, measure_wide
from moefit.plan.timing import time_format, time_rest
from moefit.serve.budget import MemoryBudget, format_bytes
from moefit.serve.dsmoe_rules import check_rule
from moefit.serve.packed import fingerprint, open_packed
from moefit.serve.placement import BlockPlacement
from moefit.serve.reckon import ledger
from moefit.serve.served import ServedModel
from moefit.serve.settings import LoadSettings
from moefit.serve.skeleton import build
from moefit.serve.store import ExpertStore

Progress = Callable[[str, int, int], None]
"""Hears what is measured next, and how many items of how many are done."""
_REPLAYED = 1024  # tokens whose routes are replayed
_SHARE = 0.75  # of the memory that is free, where no budget is given
_PROMPT = 16


class Profiler:
    """One run of measurements. `path` is where the profile is."""

    def __init__(
        self, subject: Subject, windows_BT: Tensor, *, text: str, memory: int | None = None
    ):
        self._subject, self._windows_BT, self._text = subject, windows_BT, text
        self._skeleton = build(subject.folder, subject.dtype)
        if self._skeleton.model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{type(self._skeleton.model).__name__} continues no text by itself; only decoders "
                "can be profiled so far; describe and bench work"
            )
        if subject.rule is not None:
            check_rule(self._skeleton.model, Rule.parse(subject.rule))
        self._packed = open_packed(self._skeleton, [parse_format(f) for f in experiments.FORMATS])
        self.facts = self._facts()
        self.path = path_for(self._skeleton, self.facts)
        if memory is not None:
            self._refuse_less(memory)
        self._room = memory or max(1, int(_SHARE * _free_memory()))
        self._reference: Reference | None = None

    def _refuse_less(self, memory: int) -> None:
        """Raise BudgetTooSmallError if not even a slot a block fits, which measuring needs."""
        fewest = uniform(dict.fromkeys(self.shapes, 1), "native")
        budget = self._ledger(fewest, None)
        if memory < budget.floor:
            raise BudgetTooSmallError(
                f"{format_bytes(memory)} is too little to measure this model in; give at least "
                f"{budget.floor} bytes ({format_bytes(budget.floor)}), or a shorter --context"
            )

    def run(self, progress: Progress | None = None) -> Profile:
        """Measure what is missing; returns the finished profile.

        Raises ConfigError while another process measures on this machine: neither's times would be
        worth anything.
        """
        if not (profile := self._begun()).missing:
            return profile
        with alone_in(
            profiles_root(),
            busy="another moefit profile is measuring on this machine, and two at once would "
            "measure each other; wait for it to end, then run the same command again: what is "
            "measured stays",
            lock=f".measuring-{platform.node()}",
        ):
            return self._run(progress)

    def _run(self, progress: Progress | None) -> Profile:
        profile, total = self._begun(), len(self.facts.wanted)
        for name in profile.missing:
            if progress is not None:
                progress(name, len(profile.items), total)
            profile = profile.with_item(name, self._measure(name, profile))
            write_profile(profile, self.path)
        if progress is not None:
            progress("done", total, total)
        return profile

    def _begun(self) -> Profile:
        if not self.path.is_file():
            return Profile(facts=self.facts, items={})
        return read_profile(self.path)

    def _measure(self, name: str, profile: Profile) -> Any:
        kind, _, what = name.partition("/")
        if kind == "bandwidth":
            found = measure_bandwidth(self._subject.folder)
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
            configuration = experiments.quality_configuration(what, self.shapes, loudness)
            return self._quality(configuration)
        packed = {name for name in experiments.FORMATS if self._is_packed(name)}
        configuration = experiments.stepwise_configuration(what, self.shapes, packed)
        if not all(one["rule_known"] for one in profile.items["routes"].values()):
            configuration = replace(configuration, mode="exact")  # no other is possible
        return self._stepwise(configuration)

    def _is_packed(self, format: str) -> bool:
        return all(self._packed.has(name, parse_format(format)) for name in self.shapes)

    def _routes(self) -> dict[str, Any]:
        """Mass, loudness, curves; the reference is made along the way if it was not."""
        with self._load(self._uniform("native")) as served:
            self._ensure_reference(served)
            count = max(1, _REPLAYED // (self._windows_BT.shape[1] - 1))
            routes = record_routes(served, self._windows_BT[:count, :-1])
        names = list(self.shapes)
        return {
            name: {
                "mass": list(one.mass_E),
                "loudness": list(one.loudness_E),
                "experts": one.experts,
                "rule_known": one.rule_known,
                "curves": make_curves(
                    one, self.shapes[name].num_experts, (names.index(name) + 0.5) / len(names)
                ),
            }
            for name, one in routes.items()
        }

    def _format(self, format: str) -> dict[str, Any]:
        store = ExpertStore(
            self._skeleton.checkpoint,
            self._skeleton.map.experts,
            {block.name: block for block in self._skeleton.blocks},
            self._packed,
        )
        with self._load(self._uniform(format)) as served:
            return time_format(served, store, self._reference_of(served)).as_dict()

    def _rest(self, format: str) -> dict[str, float]:
        fewest = dict.fromkeys(self.shapes, 1)
        with self._load(self._uniform("native", slots=fewest, rest=format)) as served:
            reckoned = served.budget
            return {
                "seconds": time_rest(served, self._reference_of(served)),
                "weights": reckoned.weights,
            }

    def _quality(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        with self._load(configuration) as served:
            return measure_wide(served, configuration, self._reference_of(served)).as_dict()

    def _stepwise(self, configuration: Configuration) -> dict[str, Any]:
        configuration = self._clamped(configuration)
        reference = self._reference_or_none()
        with self._load(configuration) as served:
            if reference is None:
                reference = self._reference_of(served)
            fill(served)
            length = self._windows_BT.shape[1] - 1 - _PROMPT
            each = min(64, length)
            steps = Steps(windows=2, prompt=_PROMPT, tokens=each)
            return measure_steps(served, configuration, reference, steps).as_dict()

    def _load(self, configuration: Configuration) -> ServedModel:
        return self._subject.load(configuration, context=self._windows_BT.shape[1])

    def _uniform(self, format: str, **more: Any) -> Configuration:
        experts = {name: shape.num_experts for name, shape in self.shapes.items()}
        return self._clamped(uniform(experts, format, **more))

    def _clamped(self, configuration: Configuration) -> Configuration:
        """With as many slots as there is memory for while profiling: exactly as good, if slower."""
        budget = self._ledger(configuration, self._room)
        if budget.planned is None or budget.fixed + budget.planned.nbytes <= self._room:
            return configuration
        return _with_fewer(configuration, self._room - budget.fixed, self.shapes)

    def _ledger(self, configuration: Configuration, memory: int | None) -> MemoryBudget:
        settings = LoadSettings(
            memory=memory,
            context=self._windows_BT.shape[1],
            dtype=self._subject.dtype,
            placement=configuration.placement,
            rest=configuration.rest,
        )
        return ledger(self._skeleton, settings, self._packed)

    def _ensure_reference(self, served: ServedModel) -> None:
        if self._reference_or_none() is None:
            made = make_reference(served, self._windows_BT)
            self._sidecar.parent.mkdir(parents=True, exist_ok=True)
            made.save(self._sidecar)
            self._reference = made

    def _reference_or_none(self) -> Reference | None:
        if self._reference is None:
            self._reference = read_reference(self._sidecar)
        return self._reference

    def _reference_of(self, served: ServedModel) -> Reference:
        """The full model's output; if its file has gone, it is made again."""
        if (found := self._reference_or_none()) is None:
            with self._load(self._uniform("native")) as full:
                self._ensure_reference(full)
            found = self._reference_or_none()
        assert found is not None, "it has just been made"
        return found

    @property
    def _sidecar(self) -> Path:
        return self.path.with_suffix(".npz")

    @property
    def shapes(self) -> Shapes:
        """Of the blocks, for experiments."""
        return self.facts.shapes

    def _facts(self) -> ProfileFacts:
        blocks = tuple(self._block_facts())
        shapes = {one.name: one.shape for one in blocks}
        return ProfileFacts(
            version=VERSION,
            fingerprint=fingerprint(self._skeleton),
            source=str(self._subject.folder.absolute()),
            dtype=str(self._skeleton.dtype).removeprefix("torch."),
            rule=self._subject.rule,
            machine=machine(self._subject.device),
            text=self._text,
            text_digest=digest_of(self._windows_BT),
            tokens=self._windows_BT.shape[0] * (self._windows_BT.shape[1] - 1),
            context=self._windows_BT.shape[1] - 1,
            blocks=blocks,
            wanted=tuple(wanted(shapes)),
        )

    def _block_facts(self) -> Iterator[BlockFacts]:
        for block in self._skeleton.blocks:
            specs = block.layout.specs
            errors: dict[str, list[float]] = {}
            for name in experiments.FORMATS:
                format = ALL_FORMATS[name]
                errors[name] = (
                    list(self._packed.relative_errors(block.name, format))
                    if format != NATIVE and self._packed.has(block.name, format)
                    else [expected_error(format)] * block.num_experts
                )
            yield BlockFacts(
                name=block.name,
                num_experts=block.num_experts,
                weights=weights_in(specs),
                slot_bytes={f: ALL_FORMATS[f].nbytes(specs) for f in experiments.FORMATS},
                errors=errors,
            )


def wanted(shapes: Shapes) -> list[str]:
    """Names of all items, in the order in which they are measured."""
    return [
        "bandwidth",
        "routes",
        *(f"format/{name}" for name in experiments.FORMATS),
        *(f"rest/{name}" for name in experiments.RESTS),
        *(f"quality/{name}" for name in experiments.quality_names(shapes)),
        *(f"steps/{name}" for name in experiments.stepwise_names()),
        "models",
    ]


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


def _free_memory() -> int:
    """Bytes that a process could have now."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
