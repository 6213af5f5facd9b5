"""Matrices that hold a checkpoint's own codes, whatever these are.

`ScaledCodes` says how a matrix is held, and there is one class for each kind of codes:
`ScaledMatrix`, `Fp8Matrix` and `KQuantMatrix`.
"""

from torch import Tensor

from moefit.checkpoint.formats.encoding import StoredCodes
from moefit.checkpoint.gguf.blocks import K_QUANTS
from moefit.moe.families import ScaledCodes
from moefit.quant.scaled.fill import fill
from moefit.quant.scaled.fp8 import Fp8Matrix, fp8_bytes
from moefit.quant.scaled.k_quants import KQuantMatrix, k_quant_bytes
from moefit.quant.scaled.matrix import ScaledMatrix, scaled_bytes

FP8_CODES = "e4m3"  # in `ScaledCodes`
HeldMatrix = ScaledMatrix | Fp8Matrix | KQuantMatrix


def held_bytes(rows: int, cols: int, stored: ScaledCodes) -> tuple[int, int]:
    """Return the bytes of a matrix's codes, and of its metadata."""
    if stored.codes == FP8_CODES:
        return fp8_bytes(rows, cols)
    if stored.codes in K_QUANTS:
        return k_quant_bytes(rows, cols, stored.codes)
    return scaled_bytes(rows, cols, stored)


def held_matrix(stored: ScaledCodes, cols: int, codes_B: Tensor, meta_B: Tensor) -> HeldMatrix:
    """Return a matrix over flat memory of the sizes of `held_bytes`."""
    if stored.codes == FP8_CODES:
        return Fp8Matrix.of(cols, codes_B, meta_B)
    kind = KQuantMatrix if stored.codes in K_QUANTS else ScaledMatrix
    return kind.of(stored, cols, codes_B, meta_B)


class FilledMatrix:
    """A matrix as the target of `DecodedRange`: rows are filled from a checkpoint's codes."""

    def __init__(self, matrix: HeldMatrix):
        self._matrix = matrix

    def fill(self, first: int, stored: StoredCodes) -> None:
        """Fill rows from `first` on. Raises CheckpointError if a code is not a number."""
        if isinstance(self._matrix, ScaledMatrix):
            fill(self._matrix, first, stored)
        else:
            self._matrix.fill(first, stored)
