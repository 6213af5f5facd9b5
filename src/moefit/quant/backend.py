"""Select the kernels of a device: compiled ones on a CPU, Triton on a GPU, or none.

Triton is not a dependency: CUDA builds of torch include it, and without it everything runs in
torch. It is imported when a GPU is first used.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from moefit.quant.cpu_kernels import KernelMatrix, KernelMlp, Weight, kernels, status
from moefit.quant.grouped_int import EncodedRows
from moefit.quant.library import SWITCH


class Backend(Protocol):
    """Kernels that compute from encoded weights without decoding them to memory."""

    def linear(
        self,
        x_TI: Tensor,
        weight: Weight | KernelMatrix,
        dtype: torch.dtype = torch.float32,
        bias_O: Tensor | None = None,
    ) -> Tensor:
        """Return x W^T + bias, [T, O] in `dtype`; the bias is float32 and added before rounding."""
        ...

    def decode(self, matrix: EncodedRows, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, I]."""
        ...

    def experts(
        self, x_TD: Tensor, mlps: Sequence[KernelMlp], tokens: Sequence[Sequence[int] | Tensor]
    ) -> Tensor:
        """Compute each expert for its tokens; return unweighted float32 y_RD, expert by expert."""
        ...

    def one_token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], rows: Sequence[int], y_KD: Tensor
    ) -> None:
        """Write each expert's unweighted output to its row of float32 y_KD."""
        ...

    def token(
        self, x_1D: Tensor, mlps: Sequence[KernelMlp], weights_1K: Tensor, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return one token's weighted sum of experts: `one_token`, then `weighted_sum`."""
        ...

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sum of outputs; see `plain_weighted_sum`."""
        ...


def backend(device: torch.device) -> Backend | None:
    """Return the kernels of a device, or None if only torch is used.

    Raises:
        ConfigError: The environment variable MOEFIT_KERNELS has an unknown value.
    """
    if device.type == "cpu":
        return kernels()
    kernels()  # checks the environment variable
    return _triton() if device.type == "cuda" and os.environ.get(SWITCH) != "torch" else None


def backend_status(device: torch.device) -> str:
    """Return the name of the kernels that a device uses, or `torch` and the reason."""
    if device.type == "cpu":
        return status()
    if backend(device):
        return "triton"
    if os.environ.get(SWITCH) == "torch":
        return f"torch: {SWITCH}=torch"
    if device.type == "cuda":
        return "torch: Triton is not installed"
    return f"torch: no kernels for {device.type}"


def decoded(matrix: EncodedRows, dtype: torch.dtype) -> Tensor:
    """Return the weights [O, I], decoded by kernels if available."""
    found = backend(matrix.codes_RB.device)
    return found.decode(matrix, dtype) if found else matrix.dense(dtype)


@cache
def _triton() -> Backend | None:
    if find_spec("triton") is None:
        return None
    from moefit.quant.gpu.gpu_kernels import TritonKernels

    return TritonKernels()
