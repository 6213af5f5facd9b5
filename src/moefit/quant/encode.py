"""From weights to codes: round to nearest, and a least-squares fit of scale and minimum.

Owns what is lost. Both give each group of 64 weights of a row its own scale and minimum. `nearest`
spreads the codes between the group's least and greatest weight. `fitted` gives up the extremes
where that makes the rest better: from several narrower spreads it alternates between the best codes
for a scale and a minimum and the best scale and minimum for the codes (Lloyd's algorithm, IEEE
Trans. Inf. Theory 28, 1982, on a uniform grid), and keeps the best, `nearest`'s own among them. Its
squared errors may be weighted by the inputs' second moments, so that columns with loud inputs count
more (the idea of llama.cpp's importance matrix, ggml-org/llama.cpp#4861).

Compiled kernels do it where there are some. `nearest`, and int8, come out bit for bit as here;
`fitted` sums in another order, so that a group may end at another scale, with an error that is as
small but for float32's rounding.

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
_NORMAL, _STEP = 2.0**-14, 2.0**-24  # of float16: the least of full precision, the least at all


def encode(
    weight_RC: Tensor, bits: int, encoder: Encoder = "fitted", *, moments_C: Tensor | None = None
) -> GroupedMatrix:
    """Encode a matrix. moments_C: mean squares of the inputs, all alike if None.

    Raises CheckpointError for weights that are NaN, infinite or beyond float16.
    """
    rows, cols = weight_RC.shape
    made = GroupedMatrix.empty(rows, cols, bits)
    encode_into(made, weight_RC, encoder, moments_C=moments_C)
    return made


def encode_into(
    target: GroupedMatrix, weight_RC: Tensor, encoder: Encoder, *, moments_C: Tensor | None = None
) -> None:
    """As `encode`, with little memory beside the target."""
    moments_C = None if moments_C is None else _relative(moments_C)
    compiled = kernels() if weight_RC.device.type == target.codes_RB.device.type == "cpu" else None
    # As it lies, a matrix needs no copy: the kernels take it whole.
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
    unsound_RC = ~(weight_RC.abs() <= LARGEST)  # NaN too
    return int(unsound_RC.flatten().nonzero()[0]) if unsound_RC.any() else None


def _encode(
    target: GroupedMatrix, weight_RC: Tensor, encoder: Encoder, moments_C: Tensor | None
) -> int | None:
    """The plain way, which the kernels are compared with; gives what `Kernels.encode` does."""
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
    # Padding repeats the row's last weight: zeros could widen the last group's spread.
    weight_RGI = F.pad(weight_RC[None], (0, padding), mode="replicate")[0].view(rows, groups, GROUP)
    if bits == 8:
        return _signed(weight_RGI)
    scale_RG1, least_RG1 = _spread(weight_RGI, bits, 1.0)
    scale_RG1, least_RG1 = _half_scale(scale_RG1), _half(least_RG1)
    if encoder == "fitted":
        moments_C = weight_RC.new_ones(cols) if moments_C is None else moments_C
        moment_GI = F.pad(moments_C, (0, padding)).view(groups, GROUP)
        scale_RG1, least_RG1 = _fit(weight_RGI, moment_GI, bits, (scale_RG1, least_RG1))
    codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits).to(torch.uint8)
    meta_RMG = torch.stack([scale_RG1[..., 0], least_RG1[..., 0]], dim=1).half()
    return pack(codes_RGI.view(-1, GROUP), bits), meta_RMG


def _signed(weight_RGI: Tensor) -> tuple[Tensor, Tensor]:
    scale_RG1 = _half_scale(weight_RGI.abs().amax(-1, keepdim=True) / 127)
    codes_RGI = (weight_RGI / _divisor(scale_RG1)).round().clamp(-127, 127)
    codes_NG = (codes_RGI + 128).to(torch.uint8).view(-1, GROUP)
    return pack(codes_NG, 8), scale_RG1.transpose(1, 2).half()


def _half(value_RG1: Tensor) -> Tensor:
    return value_RG1.clamp(-LARGEST, LARGEST).half().float()


def _half_scale(scale_RG1: Tensor) -> Tensor:
    """As float16 has it; where that has few digits left, rounded up, so that codes reach all."""
    few_RG1 = (scale_RG1 / _STEP).ceil() * _STEP
    return few_RG1.where(scale_RG1 < _NORMAL, _half(scale_RG1))


def _relative(moments_C: Tensor) -> Tensor:
    """Moments beside their mean; no input counts nothing at all."""
    moments_C = moments_C.float()
    return (moments_C / moments_C.mean().clamp_min(1e-30)).clamp_min(1e-6)


def _spread(weight_RGI: Tensor, bits: int, share: float) -> tuple[Tensor, Tensor]:
    """Scale and minimum that cover this share of the way between the extremes, about its middle."""
    low_RG1, high_RG1 = weight_RGI.amin(-1, keepdim=True), weight_RGI.amax(-1, keepdim=True)
    middle_RG1, half_RG1 = (low_RG1 + high_RG1) / 2, (high_RG1 - low_RG1) / 2 * share
    return 2 * half_RG1 / (2**bits - 1), middle_RG1 - half_RG1


def _nearest(weight_RGI: Tensor, scale_RG1: Tensor, least_RG1: Tensor, bits: int) -> Tensor:
    codes_RGI = (weight_RGI - least_RG1).div_(_divisor(scale_RG1))
    return codes_RGI.round_().clamp_(0, 2**bits - 1)


def _divisor(scale_RG1: Tensor) -> Tensor:
    """A group of equal weights has scale 0; its codes don't matter."""
    return scale_RG1.where(scale_RG1.abs() > 0, torch.ones_like(scale_RG1))


def _fit(
    weight_RGI: Tensor, moment_GI: Tensor, bits: int, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    best_RG1 = _error(weight_RGI, moment_GI, bits, *best)
    for share in _SPREADS.get(bits, (1.0,)):
        scale_RG1, least_RG1 = _spread(weight_RGI, bits, share)
        for _ in range(_ROUNDS):
            codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits)
            scale_RG1, least_RG1 = _regress(weight_RGI, codes_RGI, moment_GI, scale_RG1, least_RG1)
        scale_RG1, least_RG1 = _half_scale(scale_RG1), _half(least_RG1)
        error_RG1 = _error(weight_RGI, moment_GI, bits, scale_RG1, least_RG1)
        better_RG1 = error_RG1 < best_RG1
        best_RG1 = error_RG1.where(better_RG1, best_RG1)
        best = scale_RG1.where(better_RG1, best[0]), least_RG1.where(better_RG1, best[1])
    return best


def _error(
    weight_RGI: Tensor, moment_GI: Tensor, bits: int, scale_RG1: Tensor, least_RG1: Tensor
) -> Tensor:
    codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits)
    error_RGI = codes_RGI.mul_(scale_RG1).add_(least_RG1).sub_(weight_RGI).square_()
    return error_RGI.mul_(moment_GI).sum(-1, keepdim=True)


def _regress(
    weight_RGI: Tensor, codes_RGI: Tensor, moment_GI: Tensor, scale_RG1: Tensor, least_RG1: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted least squares of weight on code; where codes are all equal, what was."""
    total_G1 = moment_GI.sum(-1, keepdim=True).clamp_min(1e-30)
    code_RG1 = (codes_RGI * moment_GI).sum(-1, keepdim=True) / total_G1
    mean_RG1 = (weight_RGI * moment_GI).sum(-1, keepdim=True) / total_G1
    centred_RGI = codes_RGI - code_RG1
    spread_RG1 = (centred_RGI.square() * moment_GI).sum(-1, keepdim=True)
    slope_RG1 = (centred_RGI * weight_RGI).mul_(moment_GI).sum(-1, keepdim=True) / spread_RG1
    sound_RG1 = spread_RG1 > 1e-6 * total_G1
    scale = slope_RG1.where(sound_RG1, scale_RG1)
    return scale, (mean_RG1 - scale * code_RG1).where(sound_RG1, least_RG1)
