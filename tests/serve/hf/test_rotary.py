"""Which rotary embeddings the kernels compute: recognised by results, for every family."""

import copy
import importlib
import pickle

import pytest
import torch
from levels import compiled
from tiny_families import families, tiny_family, token_ids
from torch import Tensor, nn

from moefit.quant.layers.layer_operations import RotaryForm, RotaryKernel
from moefit.serve.hf import rotary
from moefit.serve.hf.rotary import RotaryRule, rotary_rule, use_rotary_kernels

pytestmark = compiled
HALVES = RotaryForm()
PAIRS = RotaryForm(halves=False, doubled=True, pairs_in=True)
PAIRS_OUT = RotaryForm(halves=False, doubled=True, pairs_in=True, pairs_out=True)
HALF_COSINES = RotaryForm(halves=False)
IN_TURN = RotaryForm(halves=False, pairs_in=True, pairs_out=True, in_turn=True)
KNOWN = {
    ("deepseek_v2", "apply_rotary_emb"): RotaryRule(tensors=2, whole=IN_TURN, half=None, part=None),
    ("olmoe", "apply_rotary_pos_emb"): RotaryRule(tensors=2, whole=HALVES, half=None, part=None),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave"): RotaryRule(
        tensors=2, whole=PAIRS, half=None, part=None
    ),
    ("glm4_moe", "apply_rotary_pos_emb"): RotaryRule(
        tensors=2, whole=HALVES, half=HALVES, part=HALVES
    ),
    ("gpt_oss", "apply_rotary_pos_emb"): RotaryRule(
        tensors=2, whole=None, half=HALF_COSINES, part=None
    ),
    ("gemma4", "apply_rotary_pos_emb"): RotaryRule(tensors=1, whole=HALVES, half=None, part=None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KNOWN, ids=str)
def test_functions_of_families_are_recognised(name, dtype) -> None:
    folder, function = name
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    assert rotary_rule(getattr(module, function), dtype) == KNOWN[name]


def test_neighbours_in_place() -> None:
    module = importlib.import_module("transformers.models.glm.modeling_glm")
    found = rotary_rule(module.apply_rotary_pos_emb, torch.bfloat16)
    assert found == RotaryRule(tensors=2, whole=PAIRS_OUT, half=PAIRS_OUT, part=PAIRS_OUT)


def rounded_once(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = own_function(q.float(), k.float(), cos.float(), sin.float())
    return wide[0].to(q.dtype), wide[1].to(k.dtype)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return own_function(q, k, cos, -sin)


def own_function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    module = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    return module.apply_rotary_pos_emb(q, k, cos, sin)


def test_other_functions_are_not() -> None:
    assert rotary_rule(own_function, torch.bfloat16) is not None
    assert rotary_rule(backwards, torch.bfloat16) is None
    assert rotary_rule(rounded_once, torch.bfloat16) is None
    assert rotary_rule(rounded_once, torch.float32) is not None
    assert rotary_rule(lambda q, k, cos, sin: (q, k), torch.bfloat16) is None
    assert rotary_rule(lambda q, k, cos, sin: None, torch.bfloat16) is None


@pytest.fixture
def calls(monkeypatch):
    """The number of tensors of each call that the kernel computed."""
    made: list[int] = []
    own = RotaryKernel.__call__

    def counted(self, cos, sin, *heads):
        result = own(self, cos, sin, *heads)
        if result is not None:
            made.append(len(heads))
        return result

    monkeypatch.setattr(RotaryKernel, "__call__", counted)
    return made


MODELS = [
    "olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "gemma4",
    "dots1",
]  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_logits_of_families_are_the_same_bits(family, dtype, calls) -> None:
    assert family in families()
    model, ids = tiny_family(family).to(dtype), token_ids(2, 9)
    wanted = model(input_ids=ids, use_cache=False).logits
    source = importlib.import_module(type(model).__module__)
    before = dict(vars(source))
    undo = use_rotary_kernels(model, dtype)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    assert calls and dict(vars(source)) == before
    number = len(calls)
    undo()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    assert len(calls) == number
    assert not any("forward" in vars(module) for module in model.modules())


@torch.inference_mode()
def test_a_family_that_rounds_once_is_left_alone_in_16_bits(calls) -> None:
    ids = token_ids(2, 9)
    for dtype, used in ((torch.bfloat16, False), (torch.float32, True)):
        model = tiny_family("ernie4_5_moe").to(dtype)
        wanted = model(input_ids=ids, use_cache=False).logits
        use_rotary_kernels(model, dtype)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        assert bool(calls) == used


class Attention(nn.Module):
    """A module that rotates in its `forward`, in the manner that a test names."""

    def __init__(self, manner: str = "plain"):
        super().__init__()
        self.manner = manner

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, twice: bool = False):
        if self.manner == "tokens first":
            q, k = own_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
            return q.transpose(1, 2), k.transpose(1, 2)
        if self.manner == "named":
            return own_rotary(q=q, k=k, cos=cos, sin=sin)
        q, k = own_rotary(q, k, cos, sin)
        return own_rotary(q, k, cos, sin) if twice else (q, k)


def own_rotary(q, k, cos, sin, unsqueeze_dim=1):
    module = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    return module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (1, 4, 3, 16), (1, 2, 3, 16), (1, 3, 16), (1, 3, 16)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("manner", "number"), [("plain", 1), ("tokens first", 1), ("named", 0)])
@torch.inference_mode()
def test_manners_of_calling(manner, number, calls) -> None:
    model, given = nn.Sequential(Attention(manner)), inputs()
    wanted = model[0](*given)
    use_rotary_kernels(model, torch.float32)
    found = model[0](*given)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(calls) == number


@torch.inference_mode()
def test_defaults_and_other_arguments_stay(calls) -> None:
    model, given = Attention(), inputs()
    wanted = model(*given, twice=True)
    use_rotary_kernels(model, torch.float32)
    assert torch.equal(model(*given, twice=True)[0], wanted[0])
    assert len(calls) == 2
    wide = model(*(one.double() for one in given))  # torch's
    assert wide[0].dtype == torch.float64 and len(calls) == 2


def test_gradients_are_torchs(calls) -> None:
    model, given = Attention(), inputs()
    use_rotary_kernels(model, torch.float32)
    given[0].requires_grad_()
    model(*given)[0].sum().backward()
    assert given[0].grad is not None and not calls


@torch.inference_mode()
def test_copies_work(calls) -> None:
    model, given = Attention(), inputs()
    use_rotary_kernels(model, torch.float32)
    wanted = model(*given)
    twin = copy.deepcopy(model)
    twin.manner = "named"
    assert torch.equal(twin(*given)[0], wanted[0]) and len(calls) == 1
    assert torch.equal(pickle.loads(pickle.dumps(model))(*given)[0], wanted[0])


def test_without_kernels_nothing_changes(monkeypatch) -> None:
    monkeypatch.setattr(rotary, "kernels", lambda: None)
    model = Attention()
    use_rotary_kernels(model, torch.float32)()
    assert "forward" not in vars(model)
