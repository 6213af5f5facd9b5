"""Build a packed store.

`pack` reads every expert from the checkpoint, encodes it in each format, or keeps its codes, and
writes one file per block and format. Files are written under a temporary name and renamed when
complete.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from moefit.checkpoint.safetensors import bytes_of
from moefit.errors import CheckpointError, ConfigError
from moefit.folders import exclusive_folder
from moefit.moe.families import MoeBlock, Tensors, TensorSpec
from moefit.quant.format import NATIVE, Format, Weights, is_matrix
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
from moefit.serve.packed.dense_build import DensePackJob, dense_formats_of
from moefit.serve.packed.file import (
    NO_DISK_SPACE,
    RECORDING,
    WRITING,
    PackedMetadata,
    PackedWriter,
    file_bytes,
)
from moefit.serve.packed.store import PackedLocation, can_be_packed

Progress = Callable[[int, int], None]
"""Callback with the bytes (or windows) done and in total."""
Versions = Mapping[Path, tuple[int, int]]
"""Time of the last change, in ns, and size of each file of a checkpoint."""


@dataclass(slots=True, kw_only=True)
class PackResult:
    """What `pack` did.

    Attributes:
        folder: The folder of the packed files.
        text: Name of the calibration text; empty without calibration.
        files: Files written.
        skipped: Files that existed already.
        replaced: Files among `files` that existed, but with another calibration.
        bytes_read: Bytes of experts read from the checkpoint.
        bytes_written: Bytes of the files written.
        seconds: Duration.
        relative_errors: Mean error over all experts by format: |W - W^|^2 / |W|^2 of weights, or
            with calibration |y - y^|^2 / |y|^2 of outputs; 0 where codes are kept.
        dense_errors: The same of dense matrices.
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
    dense_errors: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        return {**asdict(self), "folder": str(self.folder)}


def pack(  # noqa: PLR0913 - keywords
    skeleton: Skeleton,
    formats: Sequence[Format],
    *,
    calibration: CalibrationText | None = None,
    dense_formats: Sequence[Format] = (),
    force: bool = False,
    progress: Progress = lambda done, total: None,
    calibrating: Progress = lambda done, total: None,
) -> PackResult:
    """Pack every expert of a model in the given formats; existing files are skipped.

    Args:
        skeleton: The model.
        formats: Formats to pack. Native is for checkpoints whose codes slots hold as they are, and
            then packed for the blocks that have such experts.
        calibration: Encode experts to minimise the error of their outputs on this text. Files
            packed without it, or with another text, are replaced. If None, existing files are kept
            whatever they were calibrated on.
        dense_formats: Formats to pack dense weights in, in the same way.
        force: Replace existing files.
        progress: Callback for packing, in bytes of the checkpoint's weights.
        calibrating: Callback for the calibration run, in windows of the text.

    Raises:
        ConfigError: A format cannot be packed or calibrated, or another process is packing.
        CheckpointError: Weights cannot be read or encoded, or files cannot be written. Finished
            files are kept, and the next call continues from there.
    """
    dense = dense_formats_of(dense_formats)
    for format in formats:
        check_packable(format, skeleton)
    for format in (*formats, *dense):
        if calibration and not format.uses_calibration:
            raise _uncalibrated(format)
    versions = _versions(skeleton)
    location = PackedLocation(skeleton)
    busy = (
        f"another process is packing this model into {location.folder}; wait for it to end, then "
        "run the same command again: finished files are skipped"
    )
    with exclusive_folder(location.folder, busy=busy):
        for leftover in location.folder.glob(f"*/.*{WRITING}"):  # of processes that were killed
            leftover.unlink(missing_ok=True)
        others = DensePackJob(skeleton, location, dense, calibration, force=force)
        job = _PackJob(skeleton, location, versions, formats, calibration, others, force=force)
        job.check_disk_space()
        try:
            job.record_inputs(calibrating)
            result = job.run(progress)
        finally:
            job.close()
        if calibration:
            shutil.rmtree(location.folder / RECORDING, ignore_errors=True)
        return result


def _versions(skeleton: Skeleton) -> Versions:
    """Return what changes when files of the checkpoint are written to or replaced."""
    found: dict[Path, tuple[int, int]] = {}
    for path in {span.path for span in skeleton.checkpoint.spans.values()}:
        with suppress(OSError):  # a file that is gone is a change too
            stat = path.stat()
            found[path] = stat.st_mtime_ns, stat.st_size
    return found


def check_packable(format: Format, skeleton: Skeleton) -> None:
    """Raise ConfigError if no block's slots of a format differ from what the checkpoint has."""
    if any(can_be_packed(format, block) for block in skeleton.blocks):
        return
    stored = "/".join(skeleton.stored().experts)
    why = f": slots hold values of {stored}, not its codes" if format == NATIVE else ""
    raise ConfigError(
        f"{format.name} experts are read from the checkpoint itself and need no packing{why}; give "
        "formats such as int8 or int4"
    )


def _uncalibrated(format: Format) -> ConfigError:
    if not format.is_encoded:
        return ConfigError(
            f"{format.name} keeps the checkpoint's codes, whatever the text; pack it without a "
            "text, or give formats such as int4 to have them calibrated"
        )
    return ConfigError(
        f"{format.name} rounds to nearest, whatever the text; give "
        f"{format.name.removesuffix('-nearest')} to have it calibrated, or pack {format.name} "
        "without a text"
    )


class _PackJob:
    """One call of `pack`; decides which files to write."""

    def __init__(  # noqa: PLR0913 - each is made by `pack`
        self,
        skeleton: Skeleton,
        location: PackedLocation,
        versions: Versions,
        formats: Sequence[Format],
        calibration: CalibrationText | None,
        dense: DensePackJob,
        *,
        force: bool,
    ):
        self._skeleton, self._location, self._calibration = skeleton, location, calibration
        self._versions = versions
        self._recorded: RecordedInputs | None = None
        self._replaced, self._dense = dense.replaced, dense
        blocks = {block.name: block for block in skeleton.blocks}
        self._store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks)
        self._formats = list({format.name: format for format in formats}.values())
        self._todo = {
            index: [f for f in self._possible(index) if force or not self._exists(f, index)]
            for index in range(len(skeleton.blocks))
        }

    def close(self) -> None:
        self._store.close()

    def _possible(self, index: int) -> list[Format]:
        return [f for f in self._formats if can_be_packed(f, self._skeleton.blocks[index])]

    def _exists(self, format: Format, index: int) -> bool:
        try:
            metadata = self._location.open(format, index).metadata
        except (CheckpointError, OSError):
            return False
        same = self._calibration is None or metadata.calibration == self._calibration.digest
        self._replaced += not same
        return same

    def check_disk_space(self) -> None:
        """Raise CheckpointError if the files would not fit on the disk."""
        sizes = [self._size(f, index) for index, some in self._todo.items() for f in some]
        sizes += self._dense.sizes
        free = shutil.disk_usage(self._location.folder).free
        if sum(sizes) > free:
            raise CheckpointError(
                f"packing takes {format_bytes(sum(sizes))} ({len(sizes)} files) in "
                f"{self._location.folder}, but only {format_bytes(free)} are free; {_FREE_SPACE}"
            )

    def record_inputs(self, calibrating: Progress) -> None:
        """Record the inputs of experts on the calibration text, if any file is to be written."""
        needed = any(self._todo.values()) or self._dense.is_calibrated
        if self._calibration is not None and needed:
            folder, dense = self._location.folder / RECORDING, self._dense.is_calibrated
            self._recorded = record_block_inputs(
                self._skeleton, self._calibration, folder, calibrating, dense=dense
            )

    def _metadata(self, format: Format, index: int) -> PackedMetadata:
        metadata = self._location.metadata(format, index)
        if self._calibration is None:
            return metadata
        return replace(metadata, calibration=self._calibration.digest, text=self._calibration.text)

    def _size(self, format: Format, index: int) -> int:
        block = self._skeleton.blocks[index]
        metadata = self._metadata(format, index)
        return file_bytes(metadata, block.num_experts, format.nbytes(block.layout.specs))

    def run(self, progress: Progress) -> PackResult:
        began, done = perf_counter(), 0
        sources = [self._skeleton.map.experts[block.name] for block in self._skeleton.blocks]
        total = sum(
            _passes(some) * s.nbytes for index, some in self._todo.items() for s in sources[index]
        )
        total += self._dense.total
        result = PackResult(folder=self._location.folder, replaced=self._replaced)
        result.text = self._calibration.text if self._calibration else ""
        result.skipped, result.files = self._dense.skipped, len(self._dense.sizes)
        result.bytes_written = sum(self._dense.sizes)
        progress(0, total)

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        for index, formats in self._todo.items():
            result.skipped += len(self._possible(index)) - len(formats)
            if not formats:
                continue
            self._pack_block(index, formats, report)
            result.files += len(formats)
            result.bytes_written += sum(self._size(format, index) for format in formats)
        try:
            inputs = self._recorded.dense if self._recorded else None
            self._dense.run(report, inputs, self._check_unchanged)
        except OSError as error:
            raise self._write_error(error, max(self._dense.sizes), "a matrix") from error
        result.bytes_read, result.seconds = done, perf_counter() - began
        result.relative_errors = {format.name: self._mean_error(format) for format in self._formats}
        result.dense_errors = self._dense.mean_errors()
        return result

    def _pack_block(
        self, index: int, formats: Sequence[Format], report: Callable[[int], None]
    ) -> None:
        """Write one block's files of all formats together, so that each expert is decoded once."""
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
                    errors = self._fill(block, expert, slots, inputs)
                    for slot, writer, error in zip(slots, writers, errors, strict=True):
                        writer.write(bytes_of(slot.buffer_B), error)
                    report(_passes(formats) * source.nbytes)
                self._check_unchanged()
                for writer in writers:
                    writer.commit()
        except OSError as error:
            needed = sum(self._size(format, index) for format in formats)
            raise self._write_error(error, needed) from error

    def _check_unchanged(self) -> None:
        """Raise CheckpointError if weights may be of other files than the fingerprint."""
        if _versions(self._skeleton) != self._versions:
            raise CheckpointError(
                f"the checkpoint in {self._location.source} has changed while it was packed; run "
                "the same command again when nothing writes to it any more"
            )

    def _fill(
        self, block: MoeBlock, expert: int, slots: Sequence[Slot], inputs: BlockInputs | None
    ) -> list[float]:
        """Fill the slots with an expert; return its relative error in each format."""
        specs = block.layout.specs
        errors = dict.fromkeys(slots, 0.0)
        for slot in slots:
            if not slot.format.is_encoded:
                self._store.read(block.name, expert, slot)
                _check_finite(slot.tensors, specs, block.name, expert)
        if encoded := [slot for slot in slots if slot.format.is_encoded]:
            native = self._store.native(block.name, expert)
            _check_finite(native, specs, block.name, expert)
            found = self._encode(block, expert, native, encoded, inputs)
            errors |= zip(encoded, found, strict=True)
        return list(errors.values())

    def _encode(
        self,
        block: MoeBlock,
        expert: int,
        native: Tensors,
        slots: Sequence[Slot],
        inputs: BlockInputs | None,
    ) -> list[float]:
        """Encode an expert into the slots; return its relative error in each format."""
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
        path = self._location.path(slot.format, index)
        path.parent.mkdir(exist_ok=True)
        return PackedWriter(path, self._metadata(slot.format, index), num_experts, slot.nbytes)

    def _mean_error(self, format: Format) -> float:
        indices = [index for index in self._todo if format in self._possible(index)]
        files = [self._location.open(format, index) for index in indices]
        errors = [error for file in files for error in file.relative_errors]
        return sum(errors) / len(errors)

    def _write_error(self, error: OSError, needed: int, what: str = "a block") -> CheckpointError:
        folder = self._location.folder
        reason = error.strerror or str(error)
        if error.errno in NO_DISK_SPACE:
            free = shutil.disk_usage(folder).free  # incomplete files are removed by now
            sizes = f"takes {format_bytes(needed)}, {format_bytes(free)} are free"
            reason = f"no space: {what} {sizes}"
        return CheckpointError(
            f"cannot write packed weights into {folder}: {reason}; finished files are kept, and "
            f"the same command continues from there; {_FREE_SPACE}"
        )


_FREE_SPACE = (
    "free some space, give fewer formats, or set XDG_CACHE_HOME to a folder on a larger disk"
)


def _passes(formats: Sequence[Format]) -> int:
    """Return how often an expert is read: to decode it, and to keep its codes."""
    return len({format.is_encoded for format in formats})


def _check_finite(
    weights: Weights, specs: Mapping[str, TensorSpec], block: str, expert: int
) -> None:
    """Raise CheckpointError if biases are not finite; matrices are checked when encoded or read."""
    for short, spec in specs.items():
        value = weights[short]
        if is_matrix(spec) or not isinstance(value, Tensor):
            continue
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"expert {expert} of {block}: {short} has weights that are not finite; copy or "
                "download the checkpoint again"
            )
