"""From weights to codes: round to nearest, and a least-squares fit of scale and minimum.

Owns what is lost. Both give each group of 64 weights of a row its own scale and minimum. `nearest`
spreads the codes between the group's least and greatest weight. `fitted` gives up the extremes
where that makes the rest better: from several narrower spreads it alternates between the best codes
for a scale and a minimum and the best scale and minimum for the codes (Lloyd's algorithm, IEEE Trans.
Inf. Theory 28, 1982, on a uniform grid), and keeps the best. Its squared errors may be weighted by
the inputs' second moments, so that columns with loud inputs count more (the idea of llama.cpp's
importance matrix, ggml-org/llama.cpp#4861).

Shapes: R rows, C columns, G groups a row, I = 64 weights of a group.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import CheckpointError
from moefit.formats.matrix import GroupedMatrix, groups_of
from moefit.formats.planes import GROUP, pack

Encoder = Literal["nearest", "fitted"]
ENCODED_AT_ONCE = 256  # rows, so that temporaries stay small beside an expert
_SPREADS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.88, 0.76), 4: (1.0, 0.9), 5: (1.0, 0.95)}
_ROUNDS = 3
_LARGEST = 65504.0  # of float16


def encode(
    weight_RC: Tensor, bits: int, encoder: Encoder = "fitted", *, moments_C: Tensor | None = None
) -> GroupedMatrix:
    """Encode a matrix. moments_C: mean squares of the inputs, all alike if None.

    Raises CheckpointError for weights that are NaN, infinite or beyond float16.
    """
    _refuse_unencodable(weight_RC)
    rows, cols = weight_RC.shape
    parts = [
        _encode_rows(part_RC.float(), bits, encoder, moments_C)
        for part_RC in weight_RC.split(ENCODED_AT_ONCE)
    ]
    codes_RB = torch.cat([codes for codes, _ in parts]).view(rows, -1)
    meta_RMG = torch.cat([meta for _, meta in parts]).contiguous()
    return GroupedMatrix(bits, cols, codes_RB, meta_RMG)


def _refuse_unencodable(weight_RC: Tensor) -> None:
    largest = float(weight_RC.abs().amax()) if weight_RC.numel() else 0.0
    if not largest <= _LARGEST:  # NaN too
        bad = (~(weight_RC.abs() <= _LARGEST)).nonzero()[0].tolist()
        raise CheckpointError(
            f"weight {bad} is {float(weight_RC[tuple(bad)])}, which no integer format can hold; "
            f"weights must be finite and at most {_LARGEST:g}"
        )


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
    moments_C = (
        weight_RC.new_ones(cols) if moments_C is None else moments_C.float().clamp_min(1e-12)
    )
    moment_GI = F.pad(moments_C, (0, padding)).view(groups, GROUP)
    scale_RG1, least_RG1 = _spread(weight_RGI, bits, 1.0)
    if encoder == "fitted":
        scale_RG1, least_RG1 = _fit(weight_RGI, moment_GI, bits)
    scale_RG1, least_RG1 = scale_RG1.half().float(), least_RG1.half().float()
    codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits).to(torch.uint8)
    meta_RMG = torch.stack([scale_RG1[..., 0], least_RG1[..., 0]], dim=1).half()
    return pack(codes_RGI.view(-1, GROUP), bits), meta_RMG


def _signed(weight_RGI: Tensor) -> tuple[Tensor, Tensor]:
    scale_RG1 = (weight_RGI.abs().amax(-1, keepdim=True) / 127).half()
    codes_RGI = (weight_RGI / _divisor(scale_RG1.float())).round().clamp(-127, 127)
    return pack((codes_RGI + 128).to(torch.uint8).view(-1, GROUP), 8), scale_RG1.transpose(1, 2)


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


def _fit(weight_RGI: Tensor, moment_GI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    best_RG1, best = None, None
    for share in _SPREADS.get(bits, (1.0,)):
        scale_RG1, least_RG1 = _spread(weight_RGI, bits, share)
        for _ in range(_ROUNDS):
            codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits)
            scale_RG1, least_RG1 = _regress(weight_RGI, codes_RGI, moment_GI, scale_RG1, least_RG1)
        codes_RGI = _nearest(weight_RGI, scale_RG1, least_RG1, bits)
        error_RGI = codes_RGI.mul_(scale_RG1).add_(least_RG1).sub_(weight_RGI).square_()
        error_RG1 = error_RGI.mul_(moment_GI).sum(-1, keepdim=True)
        if best is None:
            best_RG1, best = error_RG1, (scale_RG1, least_RG1)
        else:
            better_RG1 = error_RG1 < best_RG1
            best_RG1 = error_RG1.where(better_RG1, best_RG1)
            best = scale_RG1.where(better_RG1, best[0]), least_RG1.where(better_RG1, best[1])
    assert best is not None
    return best


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
