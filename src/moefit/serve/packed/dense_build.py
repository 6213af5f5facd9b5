"""Pack dense weights: encode each matrix once, and write it to a file of its own.

Weights are loaded in groups as a server loads them, so that the memory is that of a group, of an
encoded matrix and of the second moments of its inputs. Files that exist are skipped, so that an
interrupted run resumes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moefit.checkpoint.safetensors import bytes_of
from moefit.errors import CheckpointError, ConfigError
from moefit.quant.encode import encode_into
from moefit.quant.error_model import relative_error
from moefit.quant.format import Format, GroupedFormat
from moefit.quant.gptq import encode_gptq
from moefit.quant.moments import SecondMoments, moments_of
from moefit.serve.hf.quant_linear import matrix_over
from moefit.serve.hf.skeleton import Skeleton, build_skeleton, visit_dense_weights
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.packed.dense import DenseLocation, DenseMatrix, buffer_of, dense_matrices
from moefit.serve.packed.dense_inputs import DenseInputs, output_error
from moefit.serve.packed.file import PackedMetadata, PackedWriter, file_bytes
from moefit.serve.packed.store import PackedLocation


def dense_formats_of(formats: Sequence[Format]) -> list[GroupedFormat]:
    """Return formats as those of dense weights, each once.

    Raises:
        ConfigError: One does not encode.
    """
    found: dict[str, GroupedFormat] = {}
    for format in formats:
        if (dense := format.dense_format) is None:
            raise ConfigError(
                f"{format.name} dense weights are read from the checkpoint itself and need no "
                "packing; give formats such as int8 or int4"
            )
        found[dense.name] = dense
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _KnownInputs:
    """The inputs of a linear layer, by the name of their file, and their second moments."""

    file: str
    x_TC: Tensor
    moments: Sequence[SecondMoments]


class DensePackJob:
    """The dense weights' part of one call of `pack`; decides which files to write.

    Args:
        skeleton: The model.
        location: Where its packed files are.
        formats: Formats to pack.
        calibration: Text to calibrate on; None to round each weight for itself.
        force: Replace existing files.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        location: PackedLocation,
        formats: Sequence[GroupedFormat],
        calibration: CalibrationText | None,
        *,
        force: bool,
    ):
        self._skeleton, self._formats, self._calibration = skeleton, formats, calibration
        self._location = DenseLocation(skeleton, location.folder, location.fingerprint)
        found = dense_matrices(skeleton) if formats else []
        self._matrices = {one.name: one for one in found}
        self.replaced = 0
        self._known: _KnownInputs | None = None  # of the last matrix: queries', then keys'
        self._todo = {
            name: [format for format in formats if force or not self._exists(format, matrix)]
            for name, matrix in self._matrices.items()
        }

    def _exists(self, format: GroupedFormat, matrix: DenseMatrix) -> bool:
        try:
            metadata = self._location.open(format, matrix).metadata
        except (CheckpointError, OSError):
            return False
        same = self._calibration is None or metadata.calibration == self._calibration.digest
        self.replaced += not same
        return same

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file to write."""
        return [
            self._file_bytes(format, self._matrices[name])
            for name, formats in self._todo.items()
            for format in formats
        ]

    @property
    def skipped(self) -> int:
        """Files that exist already."""
        return len(self._matrices) * len(self._formats) - len(self.sizes)

    @property
    def total(self) -> int:
        """Bytes of the matrices to encode, as they are before."""
        return sum(self._matrices[name].nbytes for name, some in self._todo.items() if some)

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs have to be recorded."""
        return self._calibration is not None and any(self._todo.values())

    def run(
        self,
        report: Callable[[int], None],
        inputs: DenseInputs | None,
        check_unchanged: Callable[[], None],
    ) -> None:
        """Write the files.

        Args:
            report: Called with the bytes of each matrix that was encoded.
            inputs: Recorded on the text that matrices are calibrated on.
            check_unchanged: Raises CheckpointError if the checkpoint has changed meanwhile.

        Raises:
            CheckpointError: Weights cannot be read or encoded.
            OSError: A file cannot be written.
        """
        if not any(self._todo.values()):
            return

        def use(weight: Tensor, owners: Mapping[str, nn.Module]) -> None:
            matrix = self._matrices[next(iter(owners))]
            known = self._inputs_of([*owners], inputs)
            self._pack(matrix, weight.detach(), known, check_unchanged)
            report(matrix.nbytes)

        done = {name for name, formats in self._todo.items() if not formats}
        folder, dtype = self._skeleton.checkpoint.folder, self._skeleton.dtype
        fresh = build_skeleton(folder, dtype)
        # With the weights of the fingerprint, which an adapter changes.
        weights = replace(fresh.map, dense_weights=self._skeleton.map.dense_weights)
        visit_dense_weights(replace(fresh, map=weights), use, done)
        self._known = None

    def _inputs_of(self, names: list[str], inputs: DenseInputs | None) -> _KnownInputs | None:
        """Return what calibrates a matrix; None for layers that nothing reached, and embeddings.

        An embedding that is tied to the output head is calibrated by the head's inputs, since its
        errors are seen in all logits, and as an embedding in one token.
        """
        file = None if inputs is None else inputs.file_of(names)
        if inputs is None or file is None:
            return None
        if self._known is None or self._known.file != file:
            self._known = None  # freed before the next is computed
            x_TC = inputs.read(file)
            self._known = _KnownInputs(file, x_TC, moments_of(x_TC, torch.ones(len(x_TC))))
        return self._known

    @torch.inference_mode()
    def _pack(
        self,
        matrix: DenseMatrix,
        weight_RC: Tensor,
        known: _KnownInputs | None,
        check_unchanged: Callable[[], None],
    ) -> None:
        for format in self._todo[matrix.name]:
            buffer_B = buffer_of(format, matrix)
            target = matrix_over(buffer_B, matrix.rows, matrix.cols, format.bits)
            try:
                if known is None:
                    encode_into(target, weight_RC, format.encoder)
                    error = relative_error([(target, weight_RC)])
                else:
                    encode_gptq(target, weight_RC, known.moments)
                    error = output_error(target, weight_RC, known.x_TC)
            except CheckpointError as failure:
                raise CheckpointError(f"{matrix.name}: {failure}") from failure
            with self._writer(format, matrix) as writer:
                writer.write(bytes_of(buffer_B), error)
                check_unchanged()
                writer.commit()

    def _writer(self, format: GroupedFormat, matrix: DenseMatrix) -> PackedWriter:
        path = self._location.path(format, matrix)
        path.parent.mkdir(exist_ok=True)
        return PackedWriter(path, self._metadata(format, matrix), 1, matrix.packed_bytes(format))

    def _metadata(self, format: GroupedFormat, matrix: DenseMatrix) -> PackedMetadata:
        metadata = self._location.metadata(format, matrix)
        if self._calibration is None:
            return metadata
        return replace(metadata, calibration=self._calibration.digest, text=self._calibration.text)

    def _file_bytes(self, format: GroupedFormat, matrix: DenseMatrix) -> int:
        return file_bytes(self._metadata(format, matrix), 1, matrix.packed_bytes(format))

    def mean_errors(self) -> dict[str, float]:
        """Return the mean relative error of all matrices by format, from their files."""
        return {
            format.name: self._mean(
                self._location.open(format, one).relative_errors[0]
                for one in self._matrices.values()
            )
            for format in self._formats
            if self._matrices
        }

    def _mean(self, errors: Iterator[float]) -> float:
        return sum(errors) / len(self._matrices)
