from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moefit.moe.layouts import ACTIVATIONS, activation_name


def halves(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x_RI.chunk(2, dim=-1)
    return gate, up


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(halves(x)[0]) * halves(x)[1]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name: str) -> None:
    assert activation_name(ACTIVATIONS[name], gated=False) == name
    assert activation_name(gated(ACTIVATIONS[name]), gated=True) == name


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("linear", "identity"),
        ("quick_gelu", None),
        ("relu6", None),
        ("gelu_10", None),
        ("mish", None),
        ("tanh", None),
        ("sigmoid", None),
    ],
)
def test_transformers_activations(theirs: str, name: str | None) -> None:
    assert activation_name(ACT2FN[theirs], gated=False) == name
    assert activation_name(gated(ACT2FN[theirs]), gated=True) == name


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(halves(x)[1]) * halves(x)[0],  # up first
        lambda x: F.silu(x[..., ::2]) * x[..., 1::2],  # interleaved
        lambda x: F.silu(halves(x)[0]) * (halves(x)[1] + 1),
        lambda x: F.silu(halves(x)[0].clamp(max=7)) * halves(x)[1],
        lambda x: F.silu(halves(x)[0]) * halves(x)[1].clamp(-7, 7),
        lambda x: F.silu(halves(x)[0].clamp(max=100)) * halves(x)[1].clamp(-100, 100),
        lambda x: F.silu(halves(x)[0]),
        lambda x: F.silu(x),
    ],
)
def test_similar_gates_are_not_confused(function) -> None:
    assert activation_name(function, gated=True) is None


class Learned(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.25, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.slope


@pytest.mark.parametrize("function", [Learned("cpu"), Learned("meta"), None, lambda x: 1 / 0])
def test_unknown_activation_is_none(function) -> None:
    assert activation_name(function, gated=False) is None


def test_default_device_has_no_effect() -> None:
    with torch.device("meta"):
        assert activation_name(F.gelu, gated=False) == "gelu"
