"""Build a packed store, and verify it.

Reads every expert once from the checkpoint, encodes it into each format and writes one file per
block and format. Files are built beside their place and renamed. `check_packed` compares every
expert with its checksum.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from moefit.checkpoint.safetensors import SpanReader, bytes_of
from moefit.errors import CheckpointError, ConfigError
from moefit.folders import alone_in
from moefit.moe.families import MoeBlock, Tensors, TensorSpec
from moefit.quant.format import FORMATS, Format, is_matrix
from moefit.quant.gptq import CalibratedExpert
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory.budget import format_bytes
from moefit.serve.packed.calibrate import (
    BlockInputs,
    CalibrationText,
    RecordedInputs,
    record_block_inputs,
)
from moefit.serve.packed.file import (
    NO_DISK_SPACE,
    WRITING,
    PackedFile,
    PackedMetadata,
    PackedWriter,
    file_bytes,
)
from moefit.serve.packed.store import PackedLocation

_RECORDING = ".calibration"
Progress = Callable[[int, int], None]
"""Hears how many bytes of the checkpoint's experts are done, and of how many."""


@dataclass(slots=True, kw_only=True)
class PackResult:
    """What was done. Errors: |W - W^|^2 / |W|^2 of each format, the mean over all experts.

    With a calibration |y - y^|^2 / |y|^2 of experts' outputs y instead; `text` is its name.
    `replaced` of `files` were there, but encoded without this calibration.
    """

    folder: Path
    text: str = ""
    files: int = 0
    skipped: int = 0
    replaced: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    relative_errors: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def pack(
    skeleton: Skeleton,
    formats: Sequence[Format],
    *,
    calibration: CalibrationText | None = None,
    force: bool = False,
    progress: Progress | None = None,
    calibrating: Progress | None = None,
) -> PackResult:
    """Pack every expert of a model in these formats; what is there already is skipped.

    calibration: encode experts by what they are given on its text; files that are there but were
    made without it are made again. With None, what is there counts, however it was calibrated.
    calibrating hears how many windows of the text are done, and of how many.
    force: make again what is there. Raises ConfigError for formats that need no packing or if
    another process is at it; CheckpointError for weights that cannot be read or encoded, named, and
    for files that cannot be written; what `record_block_inputs` does. Finished files then stay,
    and the next call goes on.
    """
    for format in formats:
        if not format.is_encoded:
            raise ConfigError(
                "native experts are read from the checkpoint's own files; name formats to pack, "
                "such as int8 or int4"
            )
        if calibration and not format.uses_calibration:
            raise ConfigError(
                f"{format.name} rounds to nearest, whatever the text; give "
                f"{format.name.removesuffix('-nearest')} to have it calibrated, or pack "
                f"{format.name} without a text"
            )
    place = PackedLocation(skeleton)
    with locked(place.folder):
        _sweep(place.folder)
        job = _PackJob(skeleton, place, formats, calibration, force=force)
        job.check_room()
        try:
            job.record(calibrating or _no_progress)
            made = job.run(progress or _no_progress)
        finally:
            job.close()
        if calibration:
            shutil.rmtree(place.folder / _RECORDING, ignore_errors=True)
        return made


def _no_progress(done: int, total: int) -> None:
    """Hears nothing."""


class _PackJob:
    """One run: which files are to be made."""

    def __init__(
        self,
        skeleton: Skeleton,
        place: PackedLocation,
        formats: Sequence[Format],
        calibration: CalibrationText | None,
        *,
        force: bool,
    ):
        self._skeleton, self._place, self._calibration = skeleton, place, calibration
        self._recorded: RecordedInputs | None = None
        self._replaced = 0
        blocks = {block.name: block for block in skeleton.blocks}
        self._store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks)
        self._formats = list({format.name: format for format in formats}.values())
        self._todo = {
            index: [f for f in self._formats if force or not self._is_there(f, index)]
            for index in range(len(skeleton.blocks))
        }

    def close(self) -> None:
        self._store.close()

    def _is_there(self, format: Format, index: int) -> bool:
        try:
            facts = self._place.open(format, index).facts
        except (CheckpointError, OSError):
            return False
        same = self._calibration is None or facts.calibration == self._calibration.digest
        self._replaced += not same
        return same

    def check_room(self) -> None:
        """Raise CheckpointError if the disk has no room for what is to be made."""
        sizes = [self._size(f, index) for index, some in self._todo.items() for f in some]
        free = shutil.disk_usage(self._place.folder).free
        if sum(sizes) > free:
            raise CheckpointError(
                f"packing takes {format_bytes(sum(sizes))} ({len(sizes)} files) in "
                f"{self._place.folder}, where {format_bytes(free)} are free; {_MAKE_ROOM}"
            )

    def record(self, calibrating: Progress) -> None:
        """Run the calibration text, if there is one and anything to be made."""
        if self._calibration is not None and any(self._todo.values()):
            folder = self._place.folder / _RECORDING
            self._recorded = record_block_inputs(
                self._skeleton, self._calibration, folder, calibrating
            )

    def _facts(self, format: Format, index: int) -> PackedMetadata:
        facts = self._place.facts(format, index)
        if self._calibration is None:
            return facts
        return replace(facts, calibration=self._calibration.digest, text=self._calibration.text)

    def _size(self, format: Format, index: int) -> int:
        block = self._skeleton.blocks[index]
        facts = self._facts(format, index)
        return file_bytes(facts, block.num_experts, format.nbytes(block.layout.specs))

    def run(self, progress: Progress) -> PackResult:
        began, done = perf_counter(), 0
        total = sum(self._native_bytes(index) for index, some in self._todo.items() if some)
        made = PackResult(folder=self._place.folder, replaced=self._replaced)
        made.text = self._calibration.text if self._calibration else ""
        progress(0, total)
        for index, formats in self._todo.items():
            made.skipped += len(self._formats) - len(formats)
            if not formats:
                continue

            def tell(more: int) -> None:
                nonlocal done
                done += more
                progress(done, total)

            self._make(index, formats, tell)
            made.files += len(formats)
            made.bytes_written += sum(self._size(format, index) for format in formats)
        made.bytes_read, made.seconds = done, perf_counter() - began
        made.relative_errors = {format.name: self._mean_error(format) for format in self._formats}
        return made

    def _native_bytes(self, index: int) -> int:
        sources = self._skeleton.map.experts[self._skeleton.blocks[index].name]
        return sum(source.nbytes for source in sources)

    def _make(self, index: int, formats: Sequence[Format], tell: Callable[[int], None]) -> None:
        """One block's files, side by side, so that each expert is read once."""
        block = self._skeleton.blocks[index]
        specs = block.layout.specs
        slots = [allocate_slot(format, specs, torch.device("cpu")) for format in formats]
        inputs = self._recorded.block(index) if self._recorded else None
        try:
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(self._writer(slot, index, block.num_experts))
                    for slot in slots
                ]
                for expert, source in enumerate(self._skeleton.map.experts[block.name]):
                    native = self._store.native(block.name, expert)
                    _check_finite(native, specs, block.name, expert)
                    losses = self._encode(block, expert, native, slots, inputs)
                    for slot, writer, loss in zip(slots, writers, losses, strict=True):
                        writer.write(bytes_of(slot.buffer_B), loss)
                    tell(source.nbytes)
                for writer in writers:
                    writer.commit()
        except OSError as error:
            raise self._unwritable(error, index, formats) from error

    def _encode(
        self,
        block: MoeBlock,
        expert: int,
        native: Tensors,
        slots: Sequence[Slot],
        inputs: BlockInputs | None,
    ) -> list[float]:
        """Fill slots with an expert; what each format loses of it."""
        specs = block.layout.specs
        if inputs is None:
            for slot in slots:
                self._store.encode(block.name, expert, native, slot)
            return [slot.format.relative_error(slot.tensors, native, specs) for slot in slots]
        try:
            calibrated = CalibratedExpert(block.layout, native, *inputs.rows(expert))
            for slot in slots:
                calibrated.encode(slot.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"expert {expert} of {block.name}: {error}") from error
        return [calibrated.relative_error(slot.format, slot.tensors) for slot in slots]

    def _writer(self, slot: Slot, index: int, num_experts: int) -> PackedWriter:
        path = self._place.path(slot.format, index)
        path.parent.mkdir(exist_ok=True)
        return PackedWriter(path, self._facts(slot.format, index), num_experts, slot.nbytes)

    def _mean_error(self, format: Format) -> float:
        files = [self._place.open(format, index) for index in self._todo]
        losses = [loss for file in files for loss in file.relative_errors]
        return sum(losses) / len(losses)

    def _unwritable(self, error: OSError, index: int, formats: Sequence[Format]) -> CheckpointError:
        folder = self._place.folder
        reason = error.strerror or str(error)
        if error.errno in NO_DISK_SPACE:
            needed = sum(self._size(format, index) for format in formats)
            free = shutil.disk_usage(folder).free  # what was unfinished is gone by now
            reason = f"no room: {format_bytes(needed)} for a block, {format_bytes(free)} free"
        return CheckpointError(
            f"cannot write packed experts into {folder}: {reason}; finished files stay and the "
            f"same command goes on from there; {_MAKE_ROOM}"
        )


_MAKE_ROOM = "make room, name fewer formats, or set XDG_CACHE_HOME to a folder on a larger disk"


def _check_finite(
    native: Tensors, specs: Mapping[str, TensorSpec], block: str, expert: int
) -> None:
    """Of what no format encodes; matrices are refused where they are encoded."""
    for short, spec in specs.items():
        if not is_matrix(spec) and not bool(native[short].isfinite().all()):
            raise CheckpointError(
                f"expert {expert} of {block}: {short} has weights that are not finite; copy or "
                "download the checkpoint again, or train it anew"
            )


def locked(folder: Path) -> AbstractContextManager[None]:
    """Make the folder and be the only process that packs into it."""
    busy = (
        f"another process is packing this model into {folder}; wait for it to end, then run the "
        "same command again: what is finished is skipped"
    )
    return alone_in(folder, busy=busy)


def _sweep(folder: Path) -> None:
    """Remove what earlier processes were killed over."""
    for leftover in folder.glob(f"*/.*{WRITING}"):
        leftover.unlink(missing_ok=True)


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """What was found. `problems` names damaged experts, unsound files and missing ones."""

    folder: Path
    formats: list[str] = field(default_factory=list)
    files: int = 0
    experts: int = 0
    bytes_read: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def check_packed(
    skeleton: Skeleton, formats: Sequence[Format] | None = None, progress: Progress | None = None
) -> CheckResult:
    """Check what is packed of a checkpoint in these formats; in all that are there if None.

    Raises CheckpointError if nothing is there at all.
    """
    place = PackedLocation(skeleton)
    there = [format for format in FORMATS.values() if (place.folder / format.name).is_dir()]
    if not there:
        raise CheckpointError(
            f"nothing of {place.source} is packed in {place.folder}; `moefit pack` does that"
        )
    chosen = there if formats is None else formats
    found = CheckResult(folder=place.folder, formats=[format.name for format in chosen])
    files: list[PackedFile] = []
    for format in chosen:
        for index, block in enumerate(skeleton.blocks):
            if not place.path(format, index).is_file():
                found.problems.append(f"{block.name} is not packed in {format.name}")
                continue
            try:
                files.append(place.open(format, index))
            except CheckpointError as error:
                found.problems.append(str(error))
    total = sum(span.nbytes for file in files for span in file.spans)
    with closing(SpanReader()) as reader:
        for file in files:
            _check_file(file, reader, found)
            if progress is not None:
                progress(found.bytes_read, total)
    return found


def _check_file(file: PackedFile, reader: SpanReader, found: CheckResult) -> None:
    found.files += 1
    for expert, span in enumerate(file.spans):
        data = bytes_of(torch.empty(span.nbytes, dtype=torch.uint8))
        found.experts += 1
        found.bytes_read += span.nbytes
        try:
            reader.read_into(span, data)
        except CheckpointError as error:
            found.problems.append(str(error))
            continue
        if damage := file.damage(expert, data):
            found.problems.append(damage)
