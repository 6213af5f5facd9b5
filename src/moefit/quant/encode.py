"""Encode weight matrices as grouped integers.

Each group of 64 weights of a row has its own scale and minimum. The `nearest` encoder spreads the
codes between the smallest and the largest weight of the group. The `fitted` encoder minimises the
squared error: starting from several narrower ranges, it alternates between the best codes for a
scale and minimum and the best scale and minimum for the codes (Lloyd's algorithm, IEEE Trans. Inf.
Theory 28, 1982, on a uniform grid), and keeps the best result, including that of `nearest`. Errors
may be weighted by the second moments of the inputs, so that columns with large inputs count more
(as in llama.cpp's importance matrix, ggml-org/llama.cpp#4861).

Compiled kernels are used if available. For `nearest` and int8 their results are bit-identical to
those of torch. For `fitted` they sum in another order, so that a group may get another scale; its
error is equal up to float32 rounding.

Shapes: R rows, C columns, G groups a row, I = 64 weights of a group.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import CheckpointError
from moefit.quant.cpu_kernels import kernels
from moefit.quant.grouped_int import (
    GROUP,
    ROWS_AT_ONCE,
    SLAB,
    GroupedMatrix,
    groups_of,
    pack,
    to_slabs,
)

Encoder = Literal["nearest", "fitted"]
_SPREADS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.88, 0.76), 4: (1.0, 0.9), 5: (1.0, 0.95)}
_ROUNDS = 3
LARGEST = 65504.0  # of float16
_NORMAL, _STEP = (
    2.0**-14,
    2.0**-24,
)  # of float16: the smallest normal and the smallest subnormal number


def encode(
    weight_RC: Tensor, bits: int, encoder: Encoder = "fitted", *, moments_C: Tensor | None = None
) -> GroupedMatrix:
    """Return an encoded matrix.

    Args:
        weight_RC: Weights.
        bits: Bits per code.
        encoder: `fitted` minimises the squared error, `nearest` rounds.
        moments_C: Mean squares of the inputs, which weight the error; None for equal weights.

    Raises:
        CheckpointError: A weight is NaN, infinite or beyond float16.
    """
    rows, cols = weight_RC.shape
    made = GroupedMatrix.empty(rows, cols, bits)
    encode_into(made, weight_RC, encoder, moments_C=moments_C)
    return made


def encode_into(
    target: GroupedMatrix, weight_RC: Tensor, encoder: Encoder, *, moments_C: Tensor | None = None
) -> None:
    """Encode into an existing matrix, chunk by chunk; see `encode`."""
    moments_C = None if moments_C is None else _normalise(moments_C)
    compiled = kernels() if weight_RC.device.type == target.codes_RB.device.type == "cpu" else None
    # Kernels take a contiguous matrix as a whole, without a copy.
    whole = -(-target.rows // SLAB) * SLAB
    rows = max(whole, SLAB) if compiled and weight_RC.is_contiguous() else ROWS_AT_ONCE
    parts = zip(weight_RC.split(rows), target.split(rows), strict=True)
    for number, (part_RC, part) in enumerate(parts):
        if compiled is None:
            bad = _encode(part, part_RC.float(), encoder, moments_C)
        else:
            fitted = encoder == "fitted"
            bad = compiled.encode(part_RC, part, fitted=fitted, moments_C=moments_C)
        if bad is not None:
            raise _not_finite(weight_RC, number * rows * target.cols + bad)


def check_finite(weight_RC: Tensor) -> None:
    """Raise CheckpointError for weights that are NaN, infinite or beyond float16."""
    if (bad := _first_not_finite(weight_RC)) is not None:
        raise _not_finite(weight_RC, bad)


def _not_finite(weight_RC: Tensor, place: int) -> CheckpointError:
    row, col = divmod(place, weight_RC.shape[1])
    return CheckpointError(
        f"the weight of output {row} for input {col} is {float(weight_RC[row, col])}, which no "
        f"integer format can hold; weights must be finite and at most {LARGEST:g}"
    )


def _first_not_finite(weight_RC: Tensor) -> int | None:
    invalid_RC = ~(weight_RC.abs() <= LARGEST)  # NaN too
    return int(invalid_RC.flatten().nonzero()[0]) if invalid_RC.any() else None


def _encode(
    target: GroupedMatrix, weight_RC: Tensor, encoder: Encoder, moments_C: Tensor | None
) -> int | None:
    """Encode in torch; return the index of an invalid weight, as `Kernels.encode` does."""
    if (bad := _first_not_finite(weight_RC)) is not None:
        return bad
    codes_NB, meta_RMG = _encode_rows(weight_RC, target.bits, encoder, moments_C)
    target.codes_RB.copy_(codes_NB.view(target.codes_RB.shape))
    target.meta_RMG.copy_(meta_RMG)
    to_slabs(target.codes_RB, target.meta_RMG)
    return None


def _encode_rows(
    weight_RC: Tensor, bits: int, encoder: Encoder, moments_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, cols = weight_RC.shape
    groups = groups_of(cols)
    padding = groups * GROUP - cols
    # Pad with the row's last weight: zeros could widen the range of the last group.
    weight_RGI = F.pad(weight_RC[None], (0, padding), mode="replicate")[0].view(rows, groups, GROUP)
    if bits == 8:
        return _encode_symmetric(weight_RGI)
    scale_RG1, min_RG1 = _spread(weight_RGI, bits, 1.0)
    scale_RG1, min_RG1 = _half_scale(scale_RG1), to_half(min_RG1)
    if encoder == "fitted":
        moments_C = weight_RC.new_ones(cols) if moments_C is None else moments_C
        moment_GI = F.pad(moments_C, (0, padding)).view(groups, GROUP)
        scale_RG1, min_RG1 = _fit(weight_RGI, moment_GI, bits, (scale_RG1, min_RG1))
    codes_RGI = _nearest(weight_RGI, scale_RG1, min_RG1, bits).to(torch.uint8)
    meta_RMG = torch.stack([scale_RG1[..., 0], min_RG1[..., 0]], dim=1).half()
    return pack(codes_RGI.view(-1, GROUP), bits), meta_RMG


def _encode_symmetric(weight_RGI: Tensor) -> tuple[Tensor, Tensor]:
    scale_RG1 = _half_scale(weight_RGI.abs().amax(-1, keepdim=True) / 127)
    codes_RGI = (weight_RGI / divisor(scale_RG1)).round().clamp(-127, 127)
    codes_NG = (codes_RGI + 128).to(torch.uint8).view(-1, GROUP)
    return pack(codes_NG, 8), scale_RG1.transpose(1, 2).half()


def to_half(value_RG1: Tensor) -> Tensor:
    """Round to float16, limited to its finite values."""
    return value_RG1.clamp(-LARGEST, LARGEST).half().float()


def _half_scale(scale_RG1: Tensor) -> Tensor:
    """Round to float16; round subnormal scales up, so that codes still cover the range."""
    subnormal_RG1 = (scale_RG1 / _STEP).ceil() * _STEP
    return subnormal_RG1.where(scale_RG1 < _NORMAL, to_half(scale_RG1))


def _normalise(moments_C: Tensor) -> Tensor:
    """Divide moments by their mean, with a small lower bound for each."""
    moments_C = moments_C.float()
    return (moments_C / moments_C.mean().clamp_min(1e-30)).clamp_min(1e-6)


def _spread(weight_RGI: Tensor, bits: int, share: float) -> tuple[Tensor, Tensor]:
    """Return scale and minimum that cover a fraction of the group's range around its middle."""
    low_RG1, high_RG1 = weight_RGI.amin(-1, keepdim=True), weight_RGI.amax(-1, keepdim=True)
    middle_RG1, half_RG1 = (low_RG1 + high_RG1) / 2, (high_RG1 - low_RG1) / 2 * share
    return 2 * half_RG1 / (2**bits - 1), middle_RG1 - half_RG1


def _nearest(weight_RGI: Tensor, scale_RG1: Tensor, min_RG1: Tensor, bits: int) -> Tensor:
    codes_RGI = (weight_RGI - min_RG1).div_(divisor(scale_RG1))
    return codes_RGI.round_().clamp_(0, 2**bits - 1)


def divisor(scale_RG1: Tensor) -> Tensor:
    """Replace scale 0, of a group of equal weights whose codes have no effect, by 1."""
    return scale_RG1.where(scale_RG1.abs() > 0, torch.ones_like(scale_RG1))


def _fit(
    weight_RGI: Tensor, moment_GI: Tensor, bits: int, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    best_RG1 = _error(weight_RGI, moment_GI, bits, *best)
    for share in _SPREADS.get(bits, (1.0,)):
        scale_RG1, min_RG1 = _spread(weight_RGI, bits, share)
        for _ in range(_ROUNDS):
            codes_RGI = _nearest(weight_RGI, scale_RG1, min_RG1, bits)
            scale_RG1, min_RG1 = _regress(weight_RGI, codes_RGI, moment_GI, scale_RG1, min_RG1)
        scale_RG1, min_RG1 = _half_scale(scale_RG1), to_half(min_RG1)
        error_RG1 = _error(weight_RGI, moment_GI, bits, scale_RG1, min_RG1)
        better_RG1 = error_RG1 < best_RG1
        best_RG1 = error_RG1.where(better_RG1, best_RG1)
        best = scale_RG1.where(better_RG1, best[0]), min_RG1.where(better_RG1, best[1])
    return best


def _error(
    weight_RGI: Tensor, moment_GI: Tensor, bits: int, scale_RG1: Tensor, min_RG1: Tensor
) -> Tensor:
    codes_RGI = _nearest(weight_RGI, scale_RG1, min_RG1, bits)
    error_RGI = codes_RGI.mul_(scale_RG1).add_(min_RG1).sub_(weight_RGI).square_()
    return error_RGI.mul_(moment_GI).sum(-1, keepdim=True)


def _regress(
    weight_RGI: Tensor, codes_RGI: Tensor, moment_GI: Tensor, scale_RG1: Tensor, min_RG1: Tensor
) -> tuple[Tensor, Tensor]:
    """Regress weights on codes; keep scale and minimum of groups whose codes are all equal."""
    total_G1 = moment_GI.sum(-1, keepdim=True).clamp_min(1e-30)
    code_RG1 = (codes_RGI * moment_GI).sum(-1, keepdim=True) / total_G1
    mean_RG1 = (weight_RGI * moment_GI).sum(-1, keepdim=True) / total_G1
    centred_RGI = codes_RGI - code_RG1
    spread_RG1 = (centred_RGI.square() * moment_GI).sum(-1, keepdim=True)
    slope_RG1 = (centred_RGI * weight_RGI).mul_(moment_GI).sum(-1, keepdim=True) / spread_RG1
    valid_RG1 = spread_RG1 > 1e-6 * total_G1
    scale = slope_RG1.where(valid_RG1, scale_RG1)
    return scale, (mean_RG1 - scale * code_RG1).where(valid_RG1, min_RG1)
