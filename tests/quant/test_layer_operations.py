"""Norms and rotary embeddings by compiled kernels, compared with torch and float64."""

import pytest
import torch
from levels import at, compiled, levels
from torch import Tensor

from moefit.quant.cpu_kernels import kernels
from moefit.quant.layers.layer_operations import (
    NormForm,
    NormKernel,
    RotaryForm,
    RotaryKernel,
    plain_norm,
    plain_rotate,
)

pytestmark = compiled
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = [
    NormForm(eps=1e-5),
    NormForm(eps=1e-6, added=1),
    NormForm(eps=1e-2, round_first=True),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_alike(found: Tensor, wanted: Tensor) -> None:
    """Few elements may differ, by one step of their dtype; float32 by the order of a sum."""
    step = torch.finfo(found.dtype).eps
    exact = found.dtype == torch.float32
    tiny = torch.finfo(found.dtype).smallest_normal * step
    torch.testing.assert_close(found, wanted, rtol=8 * step if exact else step, atol=tiny)
    if not exact:
        assert (found != wanted).float().mean() <= 0.02


@levels
@DTYPES
@pytest.mark.parametrize("width", [1, 7, 16, 65, 300])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_norms_round_as_torch_does(level, dtype, width, form) -> None:
    x_RD = normal(5, width, dtype=dtype) * torch.tensor([1e-3, 0.1, 1, 50, 0])[:, None].to(dtype)
    weights = [normal(width, seed=1, dtype=dtype)]
    if not form.round_first:
        weights += [normal(width, seed=2), None]
    for weight_D in weights:
        found = NormKernel(at(level), weight_D, form, dtype, width)(x_RD)
        assert found.dtype == dtype and found.shape == x_RD.shape
        assert_rounded_alike(found, plain_norm(x_RD, weight_D, form))
        exact = plain_norm(x_RD.double(), None if weight_D is None else weight_D.double(), form)
        rounding = torch.finfo(dtype).eps * (1 if form.round_first else 0.51) + 1e-6
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=1e-7)


@levels
@DTYPES
def test_a_rows_norm_does_not_depend_on_the_others(level, dtype) -> None:
    norm = NormKernel(at(level), normal(300, dtype=dtype), FORMS[0], dtype)
    x_RD = normal(700, 300, seed=3, dtype=dtype)
    together = norm(x_RD)
    for first, last in ((0, 1), (5, 12), (100, 700)):
        assert torch.equal(norm(x_RD[first:last]), together[first:last])


@levels
def test_norms_of_numbers_that_are_not_finite(level) -> None:
    x_RD = torch.ones(3, 40, dtype=torch.bfloat16)
    x_RD[0, 3], x_RD[1, 39] = torch.nan, torch.inf
    found = NormKernel(at(level), None, FORMS[0], torch.bfloat16, 40)(x_RD)
    wanted = plain_norm(x_RD, None, FORMS[0])
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert found[0].isnan().all()


ROTARY_FORMS = [
    RotaryForm(),
    RotaryForm(halves=False),
    RotaryForm(halves=False, doubled=True, pairs_in=True),
    RotaryForm(halves=False, doubled=True, pairs_in=True, pairs_out=True),
    RotaryForm(halves=False, pairs_in=True, pairs_out=True, in_turn=True),
]


@levels
@DTYPES
@pytest.mark.parametrize("form", ROTARY_FORMS, ids=str)
@pytest.mark.parametrize("width", [2, 6, 16, 40, 128])
@pytest.mark.parametrize("rest", [0, 5])
def test_rotated_heads_are_torchs(level, dtype, form, width, rest) -> None:
    kernel = RotaryKernel(at(level), form)
    angles = torch.float32 if form.in_turn else dtype
    cosines = width // 2 if form.rotated(4) == 8 else width
    queries = normal(2, 3, 5, width + rest, dtype=dtype).transpose(1, 2)  # [B, H, T, C]
    keys = normal(2, 1, 3, width + rest, seed=1, dtype=dtype)
    for batch in (2, 1):
        cos_BTR, sin_BTR = normal(2, batch, 3, cosines, seed=2, dtype=angles)
        made = kernel(cos_BTR, sin_BTR, queries, keys)
        assert made is not None
        for one, x in zip(made, (queries, keys), strict=True):
            assert torch.equal(one, plain_rotate(x, cos_BTR, sin_BTR, form))
            assert one.stride() == torch.empty_like(x).stride()
        alone = kernel(cos_BTR, sin_BTR, keys)
        assert alone is not None and torch.equal(alone[0], made[1])


@levels
def test_heads_that_are_parts_of_wider_ones(level) -> None:
    kernel = RotaryKernel(at(level), RotaryForm())
    wide_BHTC = normal(1, 4, 70, 40)
    _, part_BHTC = wide_BHTC.split([24, 16], dim=-1)
    cos_BTR, sin_BTR = normal(2, 1, 70, 16, seed=1)
    made = kernel(cos_BTR, sin_BTR, part_BHTC)
    assert made is not None
    assert torch.equal(made[0], plain_rotate(part_BHTC, cos_BTR, sin_BTR, RotaryForm()))
    for token in (0, 33, 69):
        one = slice(token, token + 1)
        alone = kernel(cos_BTR[:, one], sin_BTR[:, one], part_BHTC[:, :, one])
        assert alone is not None and torch.equal(alone[0], made[0][:, :, one])


def test_what_the_rotary_kernel_does_not_support() -> None:
    found = kernels()
    assert found is not None
    kernel = RotaryKernel(found, RotaryForm())
    heads, cos, sin = normal(1, 2, 3, 8), normal(1, 3, 8), normal(1, 3, 8)
    assert kernel(cos, sin, heads) is not None
    assert kernel(cos.bfloat16(), sin.bfloat16(), heads) is None
    assert kernel(cos.double(), sin.double(), heads.double()) is None
    assert kernel(normal(1, 3, 16), normal(1, 3, 16), heads) is None
    assert kernel(cos[:, :2], sin[:, :2], heads) is None
    assert kernel(cos, sin, heads.transpose(2, 3).contiguous().transpose(2, 3)) is None
    assert kernel(cos, sin[..., :4], heads) is None
