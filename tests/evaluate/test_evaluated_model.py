import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moefit.dsmoe.card import model_card
from moefit.dsmoe.export import export_olmoe
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.evaluate.perplexity import Text, score
from moefit.moe.routing import Rule, default_rules

IDS = tokens(2, 9)


def stock(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_experts": 5, "num_experts_per_tok": 5,
        "initializer_range": 0.4, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return OlmoeForCausalLM(OlmoeConfig(**(sizes | changes))).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("rule", ["top_k:2", "top_k:2:renormalize", "dense"])
def test_olmoe_with_rule_equals_configured_olmoe(rule):
    parsed = Rule.parse(rule)
    model = stock(num_experts_per_tok=3)
    twin = stock(num_experts_per_tok=parsed.k or 5, norm_topk_prob=parsed.renormalize)
    before = logits(model)
    with evaluated_model(model).use(parsed):
        torch.testing.assert_close(logits(model), logits(twin))
    torch.testing.assert_close(logits(model), before)


def test_olmoe_is_restored_after_error():
    model = stock(num_experts_per_tok=3, norm_topk_prob=True)
    with pytest.raises(ZeroDivisionError), evaluated_model(model).use(Rule.parse("top_k:1")):
        raise ZeroDivisionError
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert [(router.top_k, router.norm_topk_prob) for router in routers] == [(3, True)] * 2


def test_exported_model_scores_like_source(tmp_path):
    model = tiny_model(qk_norm=True)
    export_olmoe(model, tmp_path / "out", experts_per_token=2)
    olmoe = OlmoeForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    text = Text(ids_T=tokens(60), text_bytes=180, context=8)
    rules = [Rule.parse(rule) for rule in ("dense", "top_k:2", "top_k:1:renormalize")]
    for ours, theirs in zip(score(model, text, rules), score(olmoe, text, rules), strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
        same = ("rule", "active_parameters", "active_share", "mlp_experts", "attention_experts")
        assert [getattr(theirs, name) for name in same] == [getattr(ours, name) for name in same]
    assert evaluated_model(olmoe).total == model_card(model.config).total_without_embeddings


def test_tied_embeddings_count_once():
    assert evaluated_model(stock(tie_word_embeddings=True)).total == evaluated_model(stock()).total


@pytest.mark.parametrize("rule", ["threshold:0.5", "threshold_top_k:0.5"])
def test_olmoe_rejects_thresholds(rule):
    text = Text(ids_T=tokens(20), text_bytes=60, context=8)
    heard = []
    with pytest.raises(UnsupportedModelError, match="use dense or top_k:K with K from 1 to 5"):
        score(stock(), text, [Rule.parse("dense"), Rule.parse(rule)], lambda *a: heard.append(a))
    assert not heard  # said before an hour of scoring, not after it


def test_too_many_experts_raise():
    with pytest.raises(ConfigError, match="top_k:5"):
        evaluated_model(stock()).check(Rule.parse("top_k:6"))


def test_default_rules():
    assert evaluated_model(tiny_model()).default_rules() == default_rules(5)
    assert [str(rule) for rule in evaluated_model(stock()).default_rules()] == [
        "dense", "top_k:2", "top_k:1",
    ]  # fmt: skip
    normalised = evaluated_model(stock(norm_topk_prob=True)).default_rules()
    assert [str(rule) for rule in normalised] == [
        "dense", "top_k:2:renormalize", "top_k:1:renormalize",
    ]  # fmt: skip


def test_other_families_raise():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="a LlamaForCausalLM does not support"):
        evaluated_model(LlamaForCausalLM(config))
