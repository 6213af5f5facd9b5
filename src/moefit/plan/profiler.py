"""Measures a model on a machine: the order of things, resumable.

Owns which items there are, what is known before any is measured, that each is written before the
next begins, and that one process measures at a time. Knows nothing of how one is measured
(`measure.py`).
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import closing

from torch import Tensor

from moefit.device import parse_device
from moefit.errors import UnsupportedModelError
from moefit.folders import exclusive_folder
from moefit.moe.routing import Rule
from moefit.plan import experiments
from moefit.plan.experiments import Shapes
from moefit.plan.measure import MeasuredModel, MeasurementContext, Measurements
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
from moefit.plan.reference import digest_of
from moefit.quant.format import FORMATS as ALL_FORMATS
from moefit.quant.format import NATIVE, parse_format, weights_in
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.layer.router_probe import check_rule
from moefit.serve.packed.store import fingerprint, open_packed

Progress = Callable[[str, int, int], None]
"""Hears what is measured next, and how many items of how many are done."""
_TIMED = ("bandwidth", "format/", "rest/", "steps/")  # how items begin that have times in them


class Profiler:
    """One run of measurements. `path` is where the profile is.

    windows_BT: of the text that is called `text`. memory: bytes to measure in, None is most of what
    is free. Raises UnsupportedModelError for an encoder-decoder, ConfigError for a rule that the
    model can't follow, BudgetTooSmallError for too little memory, and what `build` does.
    """

    def __init__(
        self, subject: MeasuredModel, windows_BT: Tensor, *, text: str, memory: int | None = None
    ):
        parse_device(subject.device)
        self._subject, self._windows_BT, self._text = subject, windows_BT, text
        self._skeleton = build_skeleton(subject.folder, subject.dtype)
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
        measured = MeasurementContext(
            model=subject,
            skeleton=self._skeleton,
            packed=self._packed,
            windows_BT=windows_BT,
            shapes=self.shapes,
            sidecar=self.path.with_suffix(".npz"),
        )
        self._measurements = Measurements(measured, memory)

    def run(self, progress: Progress | None = None, *, again: bool = False) -> Profile:
        """Measure what is missing; returns the finished profile.

        again: forget all times first, such as those of a machine that was busy.
        Raises ConfigError while another process measures on this machine: neither's times would be
        worth anything; and what loading the model does.
        """
        if not again and not (profile := self._begun()).missing:
            return profile
        with exclusive_folder(
            profiles_root(),
            busy="another moefit profile is measuring on this machine, and two at once would "
            "measure each other; wait for it to end, then run the same command again: what is "
            "measured stays",
            lock=f".measuring-{platform.node()}",
        ):
            if again:
                write_profile(self._begun().without(_TIMED), self.path)
            return self._run(progress)

    def _run(self, progress: Progress | None) -> Profile:
        profile, total = self._begun(), len(self.facts.wanted)
        with closing(self._measurements):
            for name in profile.missing:
                if progress is not None:
                    progress(name, len(profile.items), total)
                profile = profile.with_item(name, self._measurements.measure(name, profile))
                write_profile(profile, self.path)
        if progress is not None:
            progress("done", total, total)
        return profile

    def _begun(self) -> Profile:
        if not self.path.is_file():
            return Profile(facts=self.facts, items={})
        return read_profile(self.path)

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
                    else [format.expected_error] * block.num_experts
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
        *(f"rest/{name}" for name in experiments.DENSE_FORMATS),
        *(f"quality/{name}" for name in experiments.quality_names(shapes)),
        *(f"steps/{name}" for name in experiments.stepwise_names()),
        "models",
    ]
