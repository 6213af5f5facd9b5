import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import OlmoeConfig
from transformers.cache_utils import DynamicCache
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

from moefit.cache_argument import CACHE_NAME, forward_with_cache
from moefit.dsmoe.attention import DsMoeAttention, attention_reference
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.moe.routing import Rule

LENGTH = 9
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "eager"])
DENSE = Rule(kind="dense")


def moa_model(**changes) -> DsMoeForCausalLM:
    return tiny_model(num_attention_experts=2, num_key_value_heads=2, **changes)


def hidden(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, LENGTH, 16, generator=generator).requires_grad_()


def angles(model: DsMoeForCausalLM, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    return model.model.rotary_emb(x_BTD, torch.arange(LENGTH)[None])


def causal_mask() -> Tensor:
    above_TT = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(above_TT, torch.finfo(torch.float32).min)


def attend(model: DsMoeForCausalLM, x_BTD: Tensor, rule: Rule = DENSE) -> Tensor:
    return model.model.layers[0].self_attn(
        x_BTD,
        position_embeddings=angles(model, x_BTD),
        attention_mask=causal_mask(),
        rule=rule,
    )[0]


def output_and_gradients(y_BTD: Tensor, x_BTD: Tensor, module: torch.nn.Module):
    module.zero_grad()
    weight_BTD = torch.randn(y_BTD.shape, generator=torch.Generator().manual_seed(3))
    (y_BTD * weight_BTD).sum().backward()
    return y_BTD.detach(), x_BTD.grad, {n: p.grad.clone() for n, p in module.named_parameters()}


@BACKENDS
@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("router_hidden_size", [None, 6])
def test_gated_attention_equals_paper(backend: str, experts: int, router_hidden_size) -> None:
    model = tiny_model(
        num_attention_experts=experts,
        num_key_value_heads=4 // experts,
        router_hidden_size=router_hidden_size,
    )
    model.set_attn_implementation(backend)
    module = model.model.layers[0].self_attn
    assert module.gate is not None
    fast_x, slow_x = hidden(), hidden()
    fast = output_and_gradients(attend(model, fast_x), fast_x, module)
    slow_y = attention_reference(module, slow_x, *angles(model, slow_x))
    slow = output_and_gradients(slow_y, slow_x, module)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_without_moa_equals_olmoe(backend: str, kv_heads: int) -> None:
    model = tiny_model(qk_norm=True, num_key_value_heads=kv_heads)
    model.set_attn_implementation(backend)
    ours = model.model.layers[0].self_attn
    config = OlmoeConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=kv_heads, rms_norm_eps=1e-5
    )
    config._attn_implementation = backend
    theirs = OlmoeAttention(config, 0)
    theirs.load_state_dict(ours.state_dict())
    x_ours, x_theirs = hidden(), hidden()
    y_theirs = theirs(x_theirs, angles(model, x_theirs), causal_mask())[0]
    torch.testing.assert_close(
        output_and_gradients(attend(model, x_ours), x_ours, ours),
        output_and_gradients(y_theirs, x_theirs, theirs),
        rtol=1e-4,
        atol=1e-5,
    )


def test_only_threshold_deactivates_attention_experts() -> None:
    model, x_BTD = moa_model(), hidden()
    dense = attend(model, x_BTD)
    for rule in ("top_k:1", "threshold_top_k:1.5"):
        assert torch.equal(attend(model, x_BTD, Rule.parse(rule)), dense)
    assert not torch.allclose(attend(model, x_BTD, Rule.parse("threshold:1.0")), dense)
    assert torch.equal(attend(model, x_BTD, Rule.parse("threshold:1e-30")), dense)


def test_inactive_attention_expert_contributes_nothing() -> None:
    model, x_BTD = moa_model(), hidden()
    module = model.model.layers[0].self_attn
    assert isinstance(module, DsMoeAttention)
    assert module.gate is not None
    best_BT = module.gate.scores(x_BTD).argmax(-1)
    sparse = attend(model, x_BTD, Rule.parse("threshold:100"))
    w_o_DGEC = module.o_proj.weight.data.view(16, 2, 2, 4)
    for expert in range(2):
        kept_DGEC = torch.zeros_like(w_o_DGEC)
        kept_DGEC[:, :, expert] = w_o_DGEC[:, :, expert]
        alone = tiny_model(num_attention_experts=2, num_key_value_heads=2)
        alone.model.layers[0].self_attn.o_proj.weight.data = kept_DGEC.view(16, 16)
        chosen_BT = best_BT == expert
        assert chosen_BT.any()
        expected = attend(alone, x_BTD)
        torch.testing.assert_close(sparse[chosen_BT], expected[chosen_BT])


@BACKENDS
@pytest.mark.parametrize("rule", ["dense", "threshold:0.9"])
def test_cached_decoding_equals_full_forward(backend: str, rule: str) -> None:
    model = moa_model(qk_norm=True, inference_rule=rule)
    model.set_attn_implementation(backend)
    ids = torch.randint(3, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in [(0, 4), *((t, t + 1) for t in range(4, LENGTH))]:
            output, cache = forward_with_cache(model, cache, input_ids=ids[:, start:stop])
            steps.append(output.logits)
        whole = model(ids, use_cache=False)
    assert whole.get(CACHE_NAME) is None
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, rtol=1e-4, atol=1e-4)
