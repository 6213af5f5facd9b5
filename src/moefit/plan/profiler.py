"""Profile a model on this machine, resumably.

Each item is written before the next is measured, and one process measures at a time. `measure.py`
measures the items.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import closing

from moefit.device import parse_device
from moefit.folders import exclusive_folder
from moefit.moe.routing import Rule
from moefit.plan import experiments
from moefit.plan.experiments import BlockShape, Shapes
from moefit.plan.measure import MeasuredModel, MeasurementContext, Measurements
from moefit.plan.profile import (
    VERSION,
    Profile,
    ProfileFacts,
    machine,
    path_for,
    profiles_root,
    read_profile,
    write_profile,
)
from moefit.quant.format import FORMATS as ALL_FORMATS
from moefit.quant.format import NATIVE, parse_format, weights_in
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.layer.router_probe import check_rule
from moefit.serve.packed.store import fingerprint, open_packed
from moefit.serve.windows import Windows

Progress = Callable[[str, int, int], None]
"""Called with the next item, and the number of items done and in total."""
_TIMED = ("bandwidth", "format/", "rest/", "steps/")  # prefixes of items that contain times


class Profiler:
    """Measures the profile of a model.

    Args:
        subject: The model.
        windows: Windows of the text; of an encoder-decoder, pairs.
        text: The text's name.
        memory: Bytes to measure in; None for most of the free memory.

    Attributes:
        facts: What the profile is of.
        path: The profile's file.

    Raises:
        ConfigError: The model does not support the rule.
        BudgetTooSmallError: There is too little memory.
        MoefitError: As `build_skeleton` does.
    """

    def __init__(
        self, subject: MeasuredModel, windows: Windows, *, text: str, memory: int | None = None
    ):
        parse_device(subject.device)
        self._subject, self._windows, self._text = subject, windows, text
        self._skeleton = build_skeleton(subject.folder, subject.dtype)
        if subject.rule is not None:
            check_rule(self._skeleton.model, Rule.parse(subject.rule))
        self._packed = open_packed(
            self._skeleton,
            [parse_format(one) for one in experiments.FORMATS],
            [parse_format(one).dense_format for one in experiments.DENSE_FORMATS],
        )
        self.facts = self._facts()
        self.path = path_for(self._skeleton, self.facts)
        measured = MeasurementContext(
            model=subject,
            skeleton=self._skeleton,
            packed=self._packed,
            windows=windows,
            shapes=self.facts.shapes,
            sidecar=self.path.with_suffix(".npz"),
        )
        self._measurements = Measurements(measured, memory)

    def run(self, progress: Progress | None = None, *, again: bool = False) -> Profile:
        """Measure the missing items and return the complete profile.

        Args:
            progress: Called before each item and at the end.
            again: Measure all times again, for example if the machine was busy before.

        Raises:
            ConfigError: Another process is measuring on this machine.
            MoefitError: As loading the model does.
        """
        if not again and not (profile := self._read()).missing:
            return profile
        with exclusive_folder(
            profiles_root(),
            busy="another moefit profile is measuring on this machine, and measurements would "
            "disturb each other; wait for it to end, then run the same command again; measured "
            "items are kept",
            lock=f".measuring-{platform.node()}",
        ):
            if again:
                write_profile(self._read().without(_TIMED), self.path)
            return self._run(progress)

    def _run(self, progress: Progress | None) -> Profile:
        profile, total = self._read(), len(self.facts.wanted)
        with closing(self._measurements):
            for name in profile.missing:
                if progress is not None:
                    progress(name, len(profile.items), total)
                profile = profile.with_item(name, self._measurements.measure(name, profile))
                write_profile(profile, self.path)
        if progress is not None:
            progress("done", total, total)
        return profile

    def _read(self) -> Profile:
        if not self.path.is_file():
            return Profile(facts=self.facts, items={})
        return read_profile(self.path)

    def _facts(self) -> ProfileFacts:
        blocks = tuple(self._block_facts())
        shapes = {one.name: one for one in blocks}
        return ProfileFacts(
            version=VERSION,
            fingerprint=fingerprint(self._skeleton),
            source=str(self._subject.folder.absolute()),
            dtype=str(self._skeleton.dtype).removeprefix("torch."),
            rule=self._subject.rule,
            machine=machine(self._subject.device),
            text=self._text,
            text_digest=self._windows.digest,
            tokens=self._windows.targets,
            context=self._windows.context,
            blocks=blocks,
            wanted=tuple(wanted(shapes)),
            source_tokens=self._windows.source_tokens,
            target_tokens=self._windows.targets / len(self._windows)
            if self._windows.source_tokens
            else 0.0,
        )

    def _block_facts(self) -> Iterator[BlockShape]:
        in_encoder = encoder_blocks(self._skeleton)
        for block in self._skeleton.blocks:
            specs = block.layout.specs
            errors: dict[str, list[float]] = {}
            for name in experiments.FORMATS:
                format = ALL_FORMATS[name]
                errors[name] = (
                    list(self._packed.relative_errors(block.name, format))
                    if format != NATIVE and self._packed.has(block.name, format)
                    else [format.expected_error] * block.num_experts
                )
            yield BlockShape(
                name=block.name,
                num_experts=block.num_experts,
                weights=weights_in(specs),
                slot_bytes={f: ALL_FORMATS[f].nbytes(specs) for f in experiments.FORMATS},
                errors=errors,
                in_encoder=block.name in in_encoder,
            )


def encoder_blocks(skeleton: Skeleton) -> set[str]:
    """Return the names of the blocks in a model's encoder; none for decoders."""
    model = skeleton.model
    if not model.config.is_encoder_decoder:
        return set()
    encoder = set(model.get_encoder().modules())
    names = {name for name, module in model.named_modules() if module in encoder}
    return names & {block.name for block in skeleton.blocks}


def wanted(shapes: Shapes) -> list[str]:
    """Return the names of all items in the order in which they are measured."""
    return [
        "bandwidth",
        "routes",
        *(f"format/{name}" for name in experiments.FORMATS),
        *(f"rest/{name}" for name in experiments.DENSE_FORMATS),
        *(f"quality/{name}" for name in experiments.quality_names(shapes)),
        *(f"steps/{name}" for name in experiments.stepwise_names()),
        "models",
    ]
