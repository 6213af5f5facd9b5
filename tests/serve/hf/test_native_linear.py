"""Linear layers in the model's dtype by kernels: which are replaced, values, and undoing it."""

import copy
import io
import pickle

import pytest
import torch
from levels import compiled
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.quant import cpu_kernels
from moefit.serve.hf.native_linear import KernelWeight, use_linear_kernels

pytestmark = compiled


class Model(nn.Module):
    """A tied embedding and head, a layer with a bias, and a router that computes in float32."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 24)
        self.layer = nn.Linear(24, 24)
        self.router = nn.Parameter(torch.randn(7, 24))
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer(self.embedding(ids))
        return self.head(x), F.linear(x.float(), self.router.float())


@pytest.fixture
def calls(monkeypatch):
    """The dtype of each product that kernels compute."""
    made: list[torch.dtype] = []
    linear = cpu_kernels.Kernels.linear

    def counted(self, x_TI, *rest):
        made.append(x_TI.dtype)
        return linear(self, x_TI, *rest)

    monkeypatch.setattr(cpu_kernels.Kernels, "linear", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_layers_heads_and_routers_in_float32_are_computed_by_kernels(dtype, calls) -> None:
    model, ids = Model(dtype), torch.arange(24).view(2, 12)
    wanted = model(ids)
    undo = use_linear_kernels(model)
    made = model(ids)
    assert calls == [dtype, dtype, torch.float32]
    for one, other in zip(made, wanted, strict=True):
        assert type(one) is Tensor and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-1)
    undo()
    assert type(model.layer.weight) is nn.Parameter and model.layer.weight.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(model(ids), wanted, strict=True))
    assert len(calls) == 3


def test_tied_weights_stay_tied_and_share_memory() -> None:
    model = Model()
    memory = model.head.weight.data_ptr()
    use_linear_kernels(model)
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.head.weight, KernelWeight) and isinstance(
        model.head.weight, nn.Parameter
    )
    assert model.head.weight.data_ptr() == memory
    assert len(list(model.parameters())) == 4


@torch.inference_mode()
def test_logits_of_a_token_do_not_depend_on_the_other_tokens() -> None:
    model = Model()
    use_linear_kernels(model)
    ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(1))
    together = model(ids)
    for first, last in ((0, 1), (3, 10), (10, 37)):
        for part, whole in zip(model(ids[first:last]), together, strict=True):
            assert torch.equal(part, whole[first:last])


def test_gradients_are_torchs(calls) -> None:
    model = Model(torch.float32)
    use_linear_kernels(model)
    x = torch.randn(3, 24, requires_grad=True)
    model.layer(x).sum().backward()
    assert x.grad is not None and not calls


@torch.inference_mode()
def test_a_weight_that_is_replaced_in_place_is_read_anew() -> None:
    model = Model(torch.float32)
    use_linear_kernels(model)
    x = torch.randn(2, 24)
    model.layer(x)
    model.layer.weight.data = torch.ones(24, 24)
    wanted = x.sum(-1, keepdim=True).expand(2, 24) + model.layer.bias
    torch.testing.assert_close(model.layer(x), wanted)


@torch.inference_mode()
def test_other_operations_and_shapes_are_torchs(calls) -> None:
    model = Model(torch.float32)
    use_linear_kernels(model)
    weight, x = model.layer.weight, torch.randn(5, 24)
    torch.testing.assert_close(x @ weight.T, F.linear(x, weight))
    assert type(weight + 1) is Tensor and type(weight[0]) is Tensor
    assert F.linear(torch.empty(0, 24), weight).shape == (0, 24)
    assert F.linear(torch.randn(24), weight).shape == (24,)
    assert F.linear(x.double(), weight.double()).dtype == torch.float64
    assert calls == [torch.float32] * 3


@torch.inference_mode()
def test_a_weight_of_another_shape_at_the_same_address_is_read_anew() -> None:
    model = Model(torch.float32)
    use_linear_kernels(model)
    x, head = torch.randn(2, 24), model.head
    whole = head(x)
    head.weight.data = head.weight.data[:8]
    assert torch.equal(head(x), whole[:, :8])


@torch.inference_mode()
def test_what_kernels_do_not_support_is_torchs(calls) -> None:
    """A bias of one element, a lazily negated input, and input that is refused."""
    model = Model(torch.float32)
    use_linear_kernels(model)
    weight, x = model.layer.weight, torch.randn(2, 24)
    torch.testing.assert_close(F.linear(x, weight, torch.ones(1)), x @ weight.T + 1)
    torch.testing.assert_close(F.linear(torch._neg_view(x), weight), -(x @ weight.T))
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(2, 23), weight)
    with pytest.raises(RuntimeError):
        F.linear(x, weight, torch.ones(24).bfloat16())
    with pytest.raises(RuntimeError):
        F.linear(torch.zeros(()), weight)
    assert not calls


def test_gradients_of_biases_are_torchs(calls) -> None:
    model = Model(torch.float32)
    use_linear_kernels(model)
    model.layer(torch.randn(3, 24)).sum().backward()
    assert torch.equal(model.layer.bias.grad, torch.full((24,), 3.0)) and not calls


def test_copies_of_a_model_are_computed_by_kernels_and_stay_tied(calls) -> None:
    model, ids = Model(), torch.arange(5)
    use_linear_kernels(model)
    with torch.inference_mode():
        wanted = model(ids)
        other = copy.deepcopy(model)
        model.layer.weight.zero_()
        del calls[:]
        made = other(ids)
    assert all(torch.equal(one, two) for one, two in zip(made, wanted, strict=True))
    assert len(calls) == 3 and other.head.weight is other.embedding.weight
    assert isinstance(other.layer.weight, nn.Parameter)


@torch.inference_mode()
def test_saved_weights_are_torchs_own() -> None:
    """`torch.load` reads them without this package."""
    model, ids = Model(), torch.arange(5)
    use_linear_kernels(model)
    wanted = model(ids)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {type(one) for one in state.values()} == {Tensor}
    assert torch.equal(state["layer.weight"], model.layer.weight)
    other = pickle.loads(pickle.dumps(model))
    assert type(other.layer.weight) is nn.Parameter and other.head.weight is other.embedding.weight
    for one, two in zip(other(ids), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-1)
