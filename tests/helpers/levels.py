"""Levels of the compiled kernels as test parameters, and inputs; missing levels are skipped.

A level is missing if the processor lacks it, or if MOEFIT_KERNELS excludes it:
`MOEFIT_KERNELS=avx2` tests a machine with AVX2 only, and `torch` one without a compiler.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moefit.quant.cpu_kernels import Kernels, kernels
from moefit.quant.library import LEVELS, SWITCH, Level, available_levels

BEST = kernels(LEVELS[-1])
MACHINE = available_levels()


def emulated(asked: str | None) -> tuple[Level, ...]:
    """Return the levels of this processor that are available with MOEFIT_KERNELS=`asked`."""
    if asked == "torch":
        return ()
    return tuple(one for one in MACHINE if not asked or LEVELS.index(one) <= LEVELS.index(asked))


ASKED = os.environ.get(SWITCH)
HERE = emulated(ASKED)


def missing(level: str) -> str | None:
    """Return why this level cannot be tested here; None if it can."""
    if level in HERE:
        return None
    if level in MACHINE:
        return f"{SWITCH}={ASKED} is set, which does without {level}"
    if BEST is None:
        return "the kernels were not compiled"
    return f"this processor lacks {level}: its best level is {BEST.level}"


def at(level: str) -> Kernels:
    """Return the kernels at this level."""
    found = kernels(level)
    assert found is not None and found.level == level
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers that depend on nothing else."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awkward(tokens: int, cols: int, *, seed: int = 0) -> Tensor:
    """Return inputs of all sizes.

    Random ones, outliers and signs alone, and a token each with zeros, with numbers that are too
    small for a scale, with infinity and with NaN.
    """
    x_TI = normal(tokens, cols, seed=seed)
    x_TI[1::4] = x_TI[1::4].sign()
    x_TI[2::4, ::37] *= 1e6
    x_TI[3::4] *= 1e-20
    for token, value in zip(range(0, tokens, 7), (0.0, 1e-31, torch.inf, torch.nan), strict=False):
        x_TI[token, : cols // 2 + 1] = value
    return x_TI


def assert_equal_with_fused_multiply_add(products: Callable[[Kernels], Tensor]) -> None:
    """Compare levels bit by bit: sums of a group are exact integers, added in one order.

    Portable code rounds products and sums apart.
    """
    made = [products(at(level)) for level in HERE if level != "portable"]
    for one in made[1:]:
        torch.testing.assert_close(one, made[0], rtol=0, atol=0, equal_nan=True)


def largest_integer(bits: int) -> int:
    """Return the integer that a group's largest activation becomes where weights have `bits`."""
    return 127 if bits <= 4 else 127 * 128


def at_level(level: str):
    """Return the level as a test parameter that is skipped if it is missing."""
    reason = missing(level)
    return pytest.param(level, marks=pytest.mark.skip(reason=reason) if reason else ())


compiled = pytest.mark.skipif(not HERE, reason=f"no kernels: {missing(LEVELS[0])}")
levels = pytest.mark.parametrize("level", [at_level(one) for one in LEVELS])
