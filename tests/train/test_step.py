from dataclasses import replace

import pytest
import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.losses import RouterLossWeights, language_model_loss
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import DivergenceError
from moefit.train.data.batches import model_inputs
from moefit.train.optimizer import make_optimizer
from moefit.train.settings import OptimizerConfig
from moefit.train.step import Stepper, make_losses


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DsMoeForCausalLM(
        DsMoeConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_attention_experts=2,
            num_experts=4,
            mlp_mi_loss_coef=0.3,
            attention_mi_loss_coef=0.2,
        )
    ).train()


def stepper(model, lr=1e-2):
    weights = RouterLossWeights(mlp_mi=0.3, attention_mi=0.2)
    return Stepper(
        model=model,
        optimizer=make_optimizer(model, OptimizerConfig(lr=lr)),
        losses=make_losses(model, weights, compile=False),
        device=torch.device("cpu"),
        bf16=False,
        clip=1.0,
    )


def test_losses_equal_model_losses(model):
    ids = torch.randint(50, (3, 9))
    expected = model(input_ids=ids, labels=ids)
    result = stepper(model).step([ids], 1)
    assert result.lm_loss + result.router_loss == pytest.approx(expected.loss.item(), abs=1e-6)
    assert result.router_loss == pytest.approx(expected.aux_loss.item(), abs=1e-6)
    assert [x.shape[-1] for x in result.mlp_logits] == [4, 4]
    assert [x.shape[-1] for x in result.attention_logits] == [2, 2]


def test_overfits_one_batch(model):
    ids = torch.randint(50, (4, 9))
    steps = stepper(model)
    losses = [steps.step([ids], 1).lm_loss for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_nonfinite_loss_changes_no_weights(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DivergenceError, match="loss nan"):
        stepper(model).step([torch.randint(50, (2, 9))], 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_compiled_losses_match(model):
    ids, weights = torch.randint(50, (3, 9)), RouterLossWeights(mlp_mi=0.3, attention_mi=0.2)
    scale = torch.tensor(1.0)
    plain = make_losses(model, weights, compile=False)
    compiled = make_losses(model, weights, compile=True)
    for rule in (None, "top_k:2", "threshold:1"):
        expected, found = plain(ids, scale, rule), compiled(ids, scale, rule)
        for a, b in zip(expected[:2], found[:2], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_step_with_rule_updates_only_chosen_experts(model):
    """The loss equals inference under the rule, and the configuration does not change."""
    ids = torch.randint(50, (3, 9))
    with torch.no_grad():  # louder, so that experts matter
        for parameter in model.parameters():
            parameter.mul_(5)
    model.set_inference_rule("top_k:1")
    sparse = language_model_loss(model.eval()(ids).logits, ids).item()
    model.set_inference_rule("dense")
    dense = language_model_loss(model(ids).logits, ids).item()
    model.train()
    assert stepper(model, lr=1e-30).step([ids], 1, rule="top_k:1").lm_loss == pytest.approx(sparse)
    assert stepper(model, lr=1e-30).step([ids], 1).lm_loss == pytest.approx(dense)
    assert sparse != pytest.approx(dense, abs=1e-4)
    assert model.config.training_rule == "dense"


def test_mi_scale_affects_only_mi_losses(model):
    ids, steps = torch.randint(50, (3, 9)), stepper(model)
    whole, half, none = (
        make_losses(model, RouterLossWeights(mlp_mi=0.3, attention_mi=0.2, z=0.1), compile=False)(
            ids, torch.tensor(scale), None
        )[1].item()
        for scale in (1.0, 0.5, 0.0)
    )
    assert half == pytest.approx((whole + none) / 2, abs=1e-6)
    assert none > 0 > whole - none
    assert steps.step([ids], 1, mi_scale=0.0).router_loss == 0


def test_skipped_steps_change_no_weights(model):
    before = [p.detach().clone() for p in model.parameters()]
    seen = []
    steps = replace(
        stepper(model), is_spike=lambda *given, sparse: not seen.append((*given, sparse))
    )
    for rule in (None, "top_k:1"):
        result = steps.step([torch.randint(50, (3, 9))], 1, rule=rule)
        loss, is_sparse = result.lm_loss + result.router_loss, rule is not None
        assert seen.pop() == (loss, result.gradient_norm, is_sparse)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    steps = replace(steps, is_spike=lambda loss, norm, sparse: False)
    steps.step([torch.randint(50, (3, 9))], 1)
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_of_one_sequence_do_not_see_each_other(model, attention):
    model.eval().set_attn_implementation(attention)
    ids = torch.tensor([[5, 6, 7, 0, 8, 9, 0, 0, 4]])
    packed = model(**model_inputs(ids, document_end=0), use_cache=False).logits
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        alone = model(input_ids=ids[:, start:end]).logits
        torch.testing.assert_close(packed[:, start:end], alone)
    unmasked = model(**model_inputs(ids, None), use_cache=False).logits
    assert not torch.allclose(packed[:, 4:7], unmasked[:, 4:7])
