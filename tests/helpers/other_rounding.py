"""A pytest plugin that changes torch's rounding: `PYTHONPATH=tests pytest -p other_rounding`.

Products on the CPU change by up to half a step of their dtype, differently for each number of rows,
as with other instructions and orders of summation. Tests that pass with it do not depend on one
processor. Processes that tests start are not affected.
"""

import warnings

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")


def rounded_otherwise(y_RC: Tensor) -> Tensor:
    place_RC = torch.arange(y_RC.numel()).view(y_RC.shape) + 7919 * len(y_RC)
    side_RC = (place_RC * 2654435761 >> 7) % 3 - 1
    wide_RC = y_RC.double()
    return (wide_RC + wide_RC * side_RC * torch.finfo(y_RC.dtype).eps / 2).to(y_RC.dtype)


def mm(a_RI: Tensor, b_IC: Tensor) -> Tensor:
    return rounded_otherwise(torch.bmm(a_RI[None], b_IC[None])[0])


def addmm(bias: Tensor, a_RI: Tensor, b_IC: Tensor, *, beta=1, alpha=1) -> Tensor:
    bias_RC = bias.expand(len(a_RI), b_IC.shape[1])
    made = torch.baddbmm(bias_RC[None], a_RI[None], b_IC[None], beta=beta, alpha=alpha)
    return rounded_otherwise(made[0])


def pytest_configure() -> None:
    """Install the rounding; not at import, because collecting doctests imports this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another implementation is what is wanted
        LIBRARY.impl("mm", mm, "CPU")
        LIBRARY.impl("addmm", addmm, "CPU")
