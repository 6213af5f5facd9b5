"""Which well-known function an expert's activation is: found by example, not by class.

Owns the few that compiled kernels compute too. Anything else is nobody's error: such experts are
computed by their family's own code.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}
_EXAMPLE = torch.stack(  # gates and ups of both signs and all sizes together, beyond any clamp
    [torch.linspace(-12, 12, 192), torch.linspace(-12, 12, 192) ** 3]
)[:, torch.arange(192) * 37 % 192]


def activation_name(function: Callable[[Tensor], Tensor], *, gated: bool) -> str | None:
    """The name of a function of [R, F], or of [R, 2F] as act(gate) * up; None if it is no such.

    >>> activation_name(F.silu, gated=False)
    'silu'
    """
    try:
        with torch.inference_mode(), torch.device("cpu"):
            found = function(_EXAMPLE)
    except Exception:  # noqa: BLE001 - one that needs other input is no well-known one
        return None
    gate, up = _EXAMPLE.chunk(2, dim=-1) if gated else (_EXAMPLE, torch.ones_like(_EXAMPLE))
    for name, known in ACTIVATIONS.items():
        value = known(gate)
        slack = (1e-5 * value.abs() + 1e-6) * up.abs()  # another way of writing it
        if found.shape == value.shape and bool(((found - value * up).abs() <= slack).all()):
            return name
    return None
