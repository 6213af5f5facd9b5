"""Which of a model's norms the kernels compute: recognised by results, for every family."""

import copy
import pickle

import pytest
import torch
from levels import compiled
from tiny_families import families, tiny_family
from torch import Tensor, nn

from moefit.quant.layers.layer_operations import NormForm, plain_norm
from moefit.serve.hf.norms import norm_form, use_norm_kernels

pytestmark = compiled


class Norm(nn.Module):
    """A norm of any form, like those of families."""

    def __init__(self, form: NormForm, *, width: int = 48, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(width).to(dtype))
        self.eps, self.form = form.eps, form

    def forward(self, x: Tensor) -> Tensor:
        return plain_norm(x, self.weight, self.form)


class EpsilonOutside(Norm):
    def forward(self, x: Tensor) -> Tensor:
        root = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        return (x.float() / (root + self.eps) * self.weight.float()).to(x.dtype)


class Centred(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return plain_norm(x - x.mean(-1, keepdim=True), self.weight, self.form)


class Doubled(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * plain_norm(x, self.weight, self.form)


FORMS = [
    NormForm(eps=1e-5),
    NormForm(eps=1e-6, added=1),
    NormForm(eps=1e-5, round_first=True),
    NormForm(eps=1e-6, added=1, round_first=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_are_told_apart(form, dtype) -> None:
    assert norm_form(Norm(form, dtype=dtype), dtype) == form


@pytest.mark.parametrize("other", [EpsilonOutside, Centred, Doubled])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_norms_are_left_alone(other, dtype) -> None:
    model = nn.Sequential(other(FORMS[0], dtype=dtype), nn.LayerNorm(48, dtype=dtype))
    use_norm_kernels(model, dtype)
    assert not any("forward" in vars(module) for module in model.modules())


def test_norms_of_torch_and_of_float32_weights() -> None:
    own = nn.RMSNorm(48, eps=1e-5, dtype=torch.bfloat16)
    nn.init.normal_(own.weight)
    assert norm_form(own, torch.bfloat16) is not None
    wide = Norm(FORMS[1], dtype=torch.float32)
    assert norm_form(wide, torch.bfloat16) == FORMS[1]


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if type(one).__name__.endswith("RMSNorm")]


KNOWN = [
    "olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe",
    "qwen3_next", "gemma4", "dots1", "ernie4_5_moe", "minimax_m2",
]  # fmt: skip


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_norms_of_families_are_computed_by_kernels(family, dtype) -> None:
    assert family in families()
    model = tiny_family(family).to(dtype)
    found = norms_of(model)
    inputs = {one: torch.randn(3, 2, len(one.weight)).to(dtype) for one in found if _weight(one)}
    wanted = {one: one(x) for one, x in inputs.items()}
    undo = use_norm_kernels(model, dtype)
    assert inputs and all("forward" in vars(one) for one in inputs), family
    for one, x in inputs.items():
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(one(x), wanted[one], rtol=8 * step, atol=8e-6)
        assert (one(x) != wanted[one]).float().mean() <= (1 if dtype == torch.float32 else 0.02)
        for row in range(3):
            assert torch.equal(one(x[row, :1]), one(x)[row, :1])
    undo()
    assert all(torch.equal(one(x), wanted[one]) for one, x in inputs.items())
    assert not any("forward" in vars(module) for module in model.modules())


def _weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor)


def test_gradients_and_other_dtypes_are_the_modules_own() -> None:
    model = Norm(FORMS[0], dtype=torch.float32)
    use_norm_kernels(model, torch.float32)
    x = torch.randn(2, 48, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model.weight.grad is not None
    with torch.no_grad():
        assert model(x.detach().bfloat16()).dtype == torch.bfloat16
        assert model(torch.empty(0, 48)).shape == (0, 48)


@torch.no_grad()
def test_copies_have_norms_of_their_own() -> None:
    model = Norm(FORMS[0], dtype=torch.float32)
    use_norm_kernels(model, torch.float32)
    x = torch.randn(2, 48)
    before = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x), before)
        made.weight.data = torch.zeros(48)
        assert not made(x).any() and torch.equal(model(x), before)
    model.weight.data = torch.zeros(48)  # other memory, which is noticed
    assert not model(x).any()
