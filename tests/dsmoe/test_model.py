from pathlib import Path

import pytest
import torch
from tiny_models import gradients, tiny_model, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.losses import language_model_loss, mutual_information_loss
from moefit.dsmoe.model import DsMoeForCausalLM, DsMoeModel, register
from moefit.errors import ConfigError
from moefit.moe.experts import ExpertWeights, reference_experts
from moefit.moe.routing import Routing, Rule

PLAIN: dict = {}
PAPER = {
    "mlp_type": "gelu",
    "num_attention_experts": 2,
    "num_key_value_heads": 2,
    "router_hidden_size": 6,
    "tie_word_embeddings": True,
}
OLMOE_SHAPED = {"qk_norm": True, "num_key_value_heads": 2}
PREGATED = {"pregated": True, "num_hidden_layers": 3, "qk_norm": True}
PREVIOUS = {**PAPER, "pregated": "previous_token"}
EMBEDDING = {**PREVIOUS, "pregated": "previous_token_and_embedding"}
SHAPES = pytest.mark.parametrize(
    "shape",
    [PLAIN, PAPER, OLMOE_SHAPED, PREGATED, PREVIOUS, EMBEDDING],
    ids=["plain", "paper", "olmoe", "pregated", "previous_token", "embedding"],
)
RULES = (
    "dense",
    "top_k:2",
    "top_k:2:renormalize",
    "threshold:0.7",
    "threshold:1.3:renormalize",
    "threshold_top_k:0.9",
)
LOSSES = {"mlp_mi_loss_coef": 0.3, "attention_mi_loss_coef": 0.2}


def logits_of(model: DsMoeForCausalLM, ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


@SHAPES
def test_dense_training_reaches_every_parameter(shape: dict) -> None:
    model = tiny_model(**shape, **LOSSES).train()
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(grad).all() for grad in found.values())
    untouched = [name for name, grad in found.items() if not grad.any()]
    assert not untouched
    of_experts = [grad for name, grad in found.items() if ".experts." in name]
    assert all(grad_ID.any() for grad_EID in of_experts for grad_ID in grad_EID)


@SHAPES
def test_mode_selects_rule(shape: dict) -> None:
    model, ids = tiny_model(**shape, inference_rule="top_k:1"), tokens(2, 9)
    sparse = logits_of(model.eval(), ids)
    dense = logits_of(model.train(), ids)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert model.set_inference_rule("dense") == "top_k:1"
    torch.testing.assert_close(logits_of(model.eval(), ids), dense)


def test_sparse_baseline_trains_only_chosen_experts() -> None:
    model = tiny_model(training_rule="top_k:1", load_balancing_loss_coef=0.1).train()
    ids = tokens(1, 1)
    model(ids, labels=ids).loss.backward()
    grad_EID = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert grad_EID.flatten(1).any(1).sum() <= 1


def test_wide_mlp_of_narrow_experts_has_same_gradients(monkeypatch) -> None:
    found = {}
    for limit in (0, 256):
        monkeypatch.setattr("moefit.dsmoe.block.WIDE_UP_TO", limit)
        model, ids = tiny_model(training_rule="top_k:2", **LOSSES).train(), tokens(2, 9)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found[limit] = {"loss": loss.detach(), **gradients(model)}
    torch.testing.assert_close(found[256], found[0], rtol=1e-4, atol=1e-6)


def test_invalid_rule_raises_and_changes_nothing() -> None:
    model = tiny_model(inference_rule="top_k:2")
    for rule in ("top_k:6", "best:3", Rule(kind="top_k", k=6)):
        with pytest.raises(ConfigError):
            model.set_inference_rule(rule)
    assert model.config.inference_rule == "top_k:2"


@SHAPES
def test_top_k_of_all_is_dense(shape: dict) -> None:
    model, ids = tiny_model(**shape), tokens(2, 9)
    dense = logits_of(model, ids)
    model.set_inference_rule("top_k:5")
    torch.testing.assert_close(logits_of(model, ids), dense)


def run_reference_experts(model: DsMoeForCausalLM) -> None:
    for block in (module for module in model.modules() if isinstance(module, DsMoeBlock)):
        experts, gated = block.experts, block.experts.has_gate
        weights = ExpertWeights(
            w_in_EID=experts.gate_up_proj if gated else experts.up_proj,
            w_out_EDF=experts.down_proj,
            activation=experts.act_fn,
            gated=gated,
        )
        experts.forward = lambda x, ids, w, weights=weights: reference_experts(
            x, Routing(ids, w), weights
        )


@SHAPES
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_reference_loop(shape: dict, rule: str) -> None:
    fast, slow = (tiny_model(**shape, inference_rule=rule) for _ in range(2))
    run_reference_experts(slow)
    ids = tokens(2, 9)
    results = []
    for model in (fast, slow):
        logits = model(ids).logits
        logits.square().mean().backward()
        results.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_pregated_routers_are_given_what_the_block_before_is() -> None:
    """The first block has two routers' inputs, the last block's experts are chosen before it."""
    model, ids = tiny_model(**PREGATED, inference_rule="top_k:2"), tokens(2, 9)
    given: list[Tensor] = []
    for block in (one for one in model.modules() if isinstance(one, DsMoeBlock)):
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        found = model(ids, output_router_logits=True).router_logits
    before = [given[0], *given[:-1]]
    for layer, x_BTD, logits in zip(model.model.layers, before, found, strict=True):
        torch.testing.assert_close(layer.mlp.gate(x_BTD.flatten(0, 1)), logits)
    plain = tiny_model(**(PREGATED | {"pregated": False}))
    plain.load_state_dict(model.state_dict())  # the same names and shapes
    assert (logits_of(plain, ids) - logits_of(model, ids)).abs().max() > 0.01


@SHAPES
def test_saved_model_loads_equal(shape: dict, tmp_path: Path) -> None:
    register()
    register()
    model, ids = tiny_model(**shape, inference_rule="threshold:0.123456789"), tokens(2, 9)
    model.save_pretrained(tmp_path)
    for loaded in (
        DsMoeForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is DsMoeForCausalLM
        assert loaded.config.inference_rule == "threshold:0.123456789"
        assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
        tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert tied == bool(shape.get("tie_word_embeddings"))
    config = AutoConfig.from_pretrained(tmp_path)
    path = {"_name_or_path": ""}
    assert config.to_dict() | path == model.config.to_dict() | path
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is DsMoeModel
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_half_precision_except_routers(tmp_path: Path) -> None:
    tiny_model(**PAPER).save_pretrained(tmp_path)
    model = DsMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = model(tokens(2, 9), output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert torch.isfinite(output.logits).all()
    routers = [*output.router_logits, *output.attention_router_logits]
    assert {logits.dtype for logits in routers} == {torch.float32}


@SHAPES
@pytest.mark.parametrize("rule", ["dense", "top_k:2"])
def test_autocast_trains_with_routers_in_float32(shape: dict, rule: str) -> None:
    model, ids = tiny_model(**shape, **LOSSES, training_rule=rule).train(), tokens(2, 9)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    routers = [*output.router_logits, *output.attention_router_logits]
    assert {logits.dtype for logits in routers} == {torch.float32}
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    torch.testing.assert_close(output.loss, exact, rtol=0.03, atol=0.03)


@SHAPES
@pytest.mark.parametrize("rule", RULES)
def test_generation_is_same_with_and_without_cache(shape: dict, rule: str) -> None:
    model, ids = tiny_model(**shape, inference_rule=rule), tokens(1, 4)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached = model.generate(ids, **options)
    assert cached.shape == (1, 10)
    if not rule.startswith("threshold_top_k"):  # its K is that of the tokens in one forward
        assert torch.equal(model.generate(ids, **options, use_cache=False), cached)


@SHAPES
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_does_not_change_tokens(shape: dict, rule: str, attention: str) -> None:
    model = tiny_model(**shape, inference_rule=rule, pad_token_id=0)
    model.set_attn_implementation(attention)
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    real = logits_of(model, padded, attention_mask=(padded != 0).long())[:, 3:]
    torch.testing.assert_close(real, logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_padded_batches_generate_like_single_ones() -> None:
    model = tiny_model(**PAPER, inference_rule="top_k:2", pad_token_id=0, eos_token_id=None)
    options = {"do_sample": False, "max_new_tokens": 5}
    short, long = tokens(1, 3), tokens(1, 6, seed=2)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    batch = torch.cat([padded, long])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    alone = [model.generate(ids, **options)[0, -5:] for ids in (short, long)]
    assert torch.equal(together[:, -5:], torch.stack(alone))


def test_router_logits_by_layer() -> None:
    model, ids = tiny_model(**PAPER), tokens(2, 9)
    output = model(ids, output_router_logits=True)
    assert output.loss is None
    assert [x.shape for x in output.router_logits] == [(18, 5)] * 2
    assert [x.shape for x in output.attention_router_logits] == [(2, 9, 2)] * 2
    without = model(ids)
    assert without.router_logits is None
    assert without.get("attention_router_logits") is None


def test_hidden_states_and_attentions_are_returned() -> None:
    model, ids = tiny_model(**PAPER), tokens(2, 9)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in output.hidden_states] == [(2, 9, 16)] * 3
    assert [x.shape for x in output.attentions] == [(2, 4, 9, 9)] * 2
    kept = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, output.logits[:, -2:])


@pytest.mark.parametrize("shape", [PLAIN, PAPER], ids=["plain", "paper"])
def test_the_loss_is_cross_entropy_plus_the_router_losses(shape: dict) -> None:
    model, ids = tiny_model(**shape, **LOSSES, z_loss_coef=0.01).train(), tokens(2, 9)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 6:], labels[1, 6:], labels[0, :3] = 0, -100, -100
    output = model(ids, attention_mask=mask, labels=labels)
    real_T = mask.flatten().bool()
    expected = sum(
        0.3 * mutual_information_loss(x, real_T) + 0.01 * x[real_T].logsumexp(-1).square().mean()
        for x in output.router_logits
    ) + sum(
        0.2 * mutual_information_loss(x.flatten(0, 1), real_T)
        for x in output.attention_router_logits
    )
    torch.testing.assert_close(output.aux_loss, expected)
    torch.testing.assert_close(output.loss - expected, language_model_loss(output.logits, labels))


def test_right_padding_does_not_change_loss() -> None:
    ids, results = tokens(2, 6), []
    for padding in (0, 4):
        model = tiny_model(**PAPER, **LOSSES).train()
        padded = torch.nn.functional.pad(ids, (0, padding), value=5)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, padding))
        labels = torch.nn.functional.pad(ids, (0, padding), value=-100)
        loss = model(padded, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_labels_without_router_logits() -> None:
    model, ids = tiny_model(**LOSSES).train(), tokens(2, 9)
    expected = model(ids, labels=ids).loss
    output = model(ids, labels=ids, output_router_logits=False)
    assert torch.equal(output.loss, expected)


def test_one_expert_equals_dense_model() -> None:
    model, ids = tiny_model(num_experts=1, **LOSSES).train(), tokens(2, 9)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.aux_loss.item() == 0
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert not any("gate.weight" in name for name, _ in model.named_parameters())


@SHAPES
def test_gradient_checkpointing_keeps_gradients(shape: dict) -> None:
    ids, results = tokens(2, 9), []
    for checkpointing in (False, True):
        model = tiny_model(**shape, **LOSSES).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        output = model(ids, labels=ids)
        assert len(output.router_logits) == model.config.num_hidden_layers
        output.loss.backward()
        results.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_inputs_embeds_instead_of_ids() -> None:
    model, ids = tiny_model(), tokens(2, 9)
    embedded = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of"):
        model()


def test_routed_scaling_factor_scales_expert_output() -> None:
    """A factor of 4 equals down projections four times as large, under dense and sparse rules."""
    scaled, plain = tiny_model(routed_scaling_factor=4.0), tiny_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter *= 4
    for rule in ("dense", "top_k:2"):
        for model in (scaled, plain):
            model.set_inference_rule(rule)
        with torch.no_grad():
            torch.testing.assert_close(scaled(tokens(2, 5)).logits, plain(tokens(2, 5)).logits)
