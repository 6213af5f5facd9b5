"""A shared expert as one call, compared with its reference and, bit by bit, with single kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, at, compiled, largest_integer, levels, normal
from torch import Tensor
from torch.nn import functional as F

from moefit.quant.cpu_kernels import KernelMatrix, Kernels, Weight
from moefit.quant.encode import encode
from moefit.quant.layers.shared_expert import (
    Linear,
    SharedExpert,
    SharedExpertKernel,
    plain_shared_expert,
)

pytestmark = compiled
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DTYPES = tuple(ROUNDING)
BITS = (None, 8, 4)


def linear(rows: int, cols: int, dtype: torch.dtype, bits: int | None, seed: int) -> Linear:
    weight_OI = (normal(rows, cols, seed=seed) / cols**0.5).to(dtype)
    weight: Weight = weight_OI if bits is None else encode(weight_OI, bits)
    bias_O = normal(rows, seed=seed + 1) if rows % 2 else None
    return Linear(weight=KernelMatrix(weight), bias_O=bias_O)


def shared_expert(
    dtype: torch.dtype, bits: int | None, *, factor: bool, hidden: int = 100, width: int = 72
) -> SharedExpert:
    return SharedExpert(
        gate=linear(hidden, width, dtype, bits, 1),
        up=linear(hidden, width, dtype, bits, 2),
        down=linear(width, hidden, dtype, bits, 3),
        factor=linear(1, width, dtype, None, 4) if factor else None,
    )


def one_by_one(kernels: Kernels, shared: SharedExpert, x_TD: Tensor) -> Tensor:
    """Return the expert's output by a call for each product, as a family's own modules do it."""

    def product(layer: Linear, x_TI: Tensor) -> Tensor:
        return kernels.linear(x_TI, layer.weight, x_TI.dtype, layer.bias_O)

    hidden_TF = kernels.elementwise("silu", product(shared.gate, x_TD)) * product(shared.up, x_TD)
    y_TD = product(shared.down, hidden_TF)
    if shared.factor is None:
        return y_TD
    return kernels.elementwise("sigmoid", product(shared.factor, x_TD)) * y_TD


@levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_one_call_is_the_reference(level: str, dtype: torch.dtype, bits: int | None) -> None:
    x_TD, y_TD = (2 * normal(5, 72)).to(dtype), normal(5, 72, seed=9).to(dtype)
    for factor in (False, True):
        shared = shared_expert(dtype, bits, factor=factor)
        assert shared.supported(dtype) and not shared.supported(torch.float64)
        made = SharedExpertKernel(at(level), shared).add(x_TD, y_TD.clone())
        assert torch.equal(made, y_TD + one_by_one(at(level), shared, x_TD))
        wanted = y_TD + plain_shared_expert(shared, x_TD)
        rounding = ROUNDING[dtype] + (3 / largest_integer(bits) if bits else 0)
        allowed = rounding * float(wanted.abs().max())
        torch.testing.assert_close(made.float(), wanted.float(), rtol=0, atol=allowed)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 40),
    hidden=st.sampled_from([16, 64, 100, 4100]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(BITS),
)
def test_tokens_do_not_depend_on_each_other(
    tokens: int, hidden: int, dtype: torch.dtype, bits: int | None
) -> None:
    shared = shared_expert(dtype, bits, factor=True, hidden=hidden)
    kernel, x_TD = SharedExpertKernel(at(HERE[-1]), shared), normal(tokens, 72).to(dtype)
    together = kernel.add(x_TD, torch.zeros_like(x_TD))
    alone = [kernel.add(one, torch.zeros_like(one)) for one in x_TD.split(1)]
    assert torch.equal(together, torch.cat(alone))


@levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_are_torchs(level: str, dtype: torch.dtype) -> None:
    """A sigmoid is the one that torch computes for a single element, bit by bit."""
    extremes = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e4, -1e4, float("inf"), -float("inf")])
    x = torch.cat([3 * normal(5000), extremes]).to(dtype)
    functions: dict[str, Any] = {"silu": F.silu, "sigmoid": torch.sigmoid}
    for name, function in functions.items():
        made, wanted = at(level).elementwise(name, x), function(x)
        step = torch.finfo(dtype).eps
        assert made.dtype == dtype
        torch.testing.assert_close(made, wanted, rtol=4 * step, atol=1e-30, equal_nan=True)
    single = torch.cat([torch.sigmoid(one) for one in x[-500:].split(1)])
    assert torch.equal(at(level).elementwise("sigmoid", x[-500:]), single)


def test_strided_values() -> None:
    x = normal(6, 8)[:, ::2]
    made = at(HERE[-1]).elementwise("silu", x)
    assert torch.equal(made, at(HERE[-1]).elementwise("silu", x.contiguous())) and made.shape == (
        6,
        4,
    )


def test_other_shapes_are_not_supported() -> None:
    shared = shared_expert(torch.float32, None, factor=False)
    wrong = SharedExpert(gate=shared.gate, up=shared.up, down=shared.gate)
    assert not wrong.supported(torch.float32)
