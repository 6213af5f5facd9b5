import math

import pytest
import torch
from tiny_models import tiny_model, tokens

from moefit.dsmoe.card import model_card
from moefit.errors import ConfigError, DataError
from moefit.evaluate import perplexity
from moefit.evaluate.perplexity import Text, score
from moefit.moe.routing import Rule


def text(length, context, **more):
    return Text(ids_T=tokens(length), text_bytes=3 * length, context=context, **more)


def rules(*names):
    return [Rule.parse(name) for name in names]


def by_hand(model, ids_T, context):
    """Reference: token by token, without batches."""
    nats = []
    for start in range(0, len(ids_T) - 1, context):
        window = ids_T[start : start + context + 1]
        logits = model(window[None, :-1]).logits[0].log_softmax(-1)
        nats += [-logits[i, token].item() for i, token in enumerate(window[1:])]
    return sum(nats) / len(nats), len(nats)


@pytest.mark.parametrize("length", [2, 9, 33, 50])
def test_each_token_is_target_once(length):
    model = tiny_model()
    with torch.no_grad():
        expected, count = by_hand(model, tokens(length), 8)
    (got,) = score(model, text(length, 8), rules("dense"))
    assert got.tokens == count == length - 1
    assert got.loss == pytest.approx(expected, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(expected / math.log(2) / 3, rel=1e-5)


def test_score_does_not_depend_on_batch_size():
    model = tiny_model()
    losses = [score(model, text(60, 8, batch_size=b), rules("top_k:2"))[0].loss for b in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_limited_tokens_are_spread_over_text():
    (got,) = score(tiny_model(), text(81, 8, max_tokens=24), rules("dense"))
    assert 16 <= got.tokens <= 24


def test_costs_depend_on_rule():
    model = tiny_model(num_attention_experts=2)
    card = model_card(model.config)
    dense, top, all_of_them, some = score(
        model, text(60, 8), rules("dense", "top_k:2", "top_k:5", "threshold:1.0")
    )
    assert (dense.mlp_experts, top.mlp_experts) == (5, 2)
    assert dense.active_share == 1
    assert top.active_parameters == card.active(Rule.parse("top_k:2"))
    assert all_of_them.loss == pytest.approx(dense.loss, rel=1e-5)
    assert 1 <= some.mlp_experts < 5
    assert 1 <= some.attention_experts <= 2
    assert some.active_parameters < dense.active_parameters


def test_measured_means_equal_routers():
    model = tiny_model()
    ids = tokens(1, 9)
    (got,) = score(model, Text(ids_T=ids[0], text_bytes=9, context=8), rules("threshold:1.0"))
    model.set_inference_rule("threshold:1.0")
    with torch.no_grad():
        logits = model(ids[:, :-1], output_router_logits=True).router_logits
    counts = [(layer.softmax(-1) * 5 > 1.0).sum(-1).float().mean().item() for layer in logits]
    assert got.mlp_experts == pytest.approx(sum(counts) / len(counts))


def test_model_is_restored():
    model = tiny_model(inference_rule="top_k:3").train()
    score(model, text(20, 8), rules("dense", "threshold:0.5"))
    assert model.config.inference_rule == "top_k:3"
    assert model.training


def test_invalid_text_or_rule_raises():
    with pytest.raises(DataError, match="give more text"):
        score(tiny_model(), text(1, 8), rules("dense"))
    with pytest.raises(ConfigError, match="top_k:5"):
        score(tiny_model(), text(20, 8), rules("top_k:6"))


def test_progress_is_reported():
    heard = []
    score(tiny_model(), text(33, 8, batch_size=2), rules("dense"), lambda *a: heard.append(a))
    assert heard == [("dense", 16, 32), ("dense", 32, 32)]


def test_progress_ends_at_its_total_with_a_limit():
    heard = []
    limited = text(100, 8, batch_size=2, max_tokens=30)
    score(tiny_model(), limited, rules("dense"), lambda *a: heard.append(a))
    assert heard == [("dense", 16, 24), ("dense", 24, 24)]
    assert limited.targets == 24


def test_warm_up_is_not_timed(monkeypatch):
    model, batches, clock = tiny_model(), [], iter(range(100))
    monkeypatch.setattr(perplexity.time, "perf_counter", lambda: next(clock))
    forward = model.forward

    def counted(*args, **kwargs):
        batches.append(next(clock))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    first, second = score(model, text(33, 8), rules("dense", "top_k:2"))
    # For each rule a call, the clock, a call, the clock.
    assert batches == [0, 2, 4, 6]
    assert first.tokens_per_second == second.tokens_per_second == 16
