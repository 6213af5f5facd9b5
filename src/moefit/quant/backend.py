"""Which kernels compute on a device: compiled ones on a CPU, Triton's on a GPU, or none.

Owns that choice alone. Triton is no dependency: CUDA builds of torch bring it, and where it is
missing everything runs in torch. It is imported when a GPU is first computed on.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from moefit.quant.cpu_kernels import SWITCH, KernelMatrix, KernelMlp, Weight, kernels, status
from moefit.quant.grouped_int import GroupedMatrix


class Backend(Protocol):
    """Computation from formats, without decoding to memory."""

    max_grouped_rows: int
    """Rows of input per matrix above which decoding once and multiplying in torch is faster."""
    max_native_rows: int
    """The same limit for weights that need no decoding."""

    def linear(
        self, x_TI: Tensor, weight: Weight | KernelMatrix, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """x W^T, [T, O] in `dtype`."""
        ...

    def decode(self, matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
        """The weights [O, I]."""
        ...

    def experts(
        self, x_TD: Tensor, mlps: Sequence[KernelMlp], tokens: Sequence[Sequence[int] | Tensor]
    ) -> Tensor:
        """Each expert over the tokens given for it, unweighted: float32 y_RD, expert by expert."""
        ...

    def one_token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], rows: Sequence[int], y_KD: Tensor
    ) -> None:
        """Each expert's output, unweighted, into its row of y_KD, float32."""
        ...

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As `plain_weighted_sum`."""
        ...


def backend(device: torch.device) -> Backend | None:
    """The kernels for this device; None where torch computes alone.

    Raises ConfigError if the environment variable MOEFIT_KERNELS has a value that does not exist.
    """
    if device.type == "cpu":
        return kernels()
    kernels()  # it alone knows which values there are
    return _triton() if device.type == "cuda" and os.environ.get(SWITCH) != "torch" else None


def backend_status(device: torch.device) -> str:
    """What computes from formats on this device, or torch and why."""
    if device.type == "cpu":
        return status()
    if backend(device):
        return "triton"
    if os.environ.get(SWITCH) == "torch":
        return f"torch: {SWITCH}=torch"
    if device.type == "cuda":
        return "torch: Triton is not installed"
    return f"torch: no kernels for {device.type}"


def decoded(matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights [O, I], by kernels where there are some."""
    found = backend(matrix.codes_RB.device)
    return found.decode(matrix, dtype) if found else matrix.dense(dtype)


@cache
def _triton() -> Backend | None:
    if find_spec("triton") is None:
        return None
    from moefit.quant.gpu_kernels import TritonKernels

    return TritonKernels()
