import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moefit.errors import ConfigError
from moefit.moe.experts import scattered_scores
from moefit.moe.routing import Routing, Rule, active_experts, masked_route, masked_scores, route

RULES = (
    "dense",
    "dense:renormalize",
    "top_k:1",
    "top_k:3",
    "top_k:3:renormalize",
    "threshold:0.5",
    "threshold:1.2:renormalize",
    "threshold:100",
    "threshold_top_k:0.9",
    "threshold_top_k:1.5:renormalize",
)


def random_scores(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_tokens, num_experts, generator=generator)).softmax(-1)


def sets(routing: Routing, num_experts: int) -> list[set[int]]:
    return [{i for i in row if i < num_experts} for row in routing.ids_TK.tolist()]


rules = st.one_of(
    st.just(Rule(kind="dense")),
    st.builds(Rule, kind=st.just("top_k"), k=st.integers(1, 4), epsilon=st.none(), renormalize=...),
    st.builds(
        Rule,
        kind=st.sampled_from(["threshold", "threshold_top_k"]),
        k=st.none(),
        epsilon=st.sampled_from([1e-5, 0.1, 0.48, 1.0, 2.5, 1e6]),
        renormalize=...,
    ),
)


@given(rules)
def test_rule_round_trips(rule: Rule) -> None:
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize("text", ["threshold:0.123456789", "top_k:1000000"])
def test_rule_keeps_digits(text: str) -> None:
    assert str(Rule.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "top_k", "top_k:", "top_k:0", "top_k:-1", "top_k:1.5", "top_k:2:3", "dense:2",
     "threshold", "threshold:0", "threshold:-1", "threshold:nan", "threshold:inf",
     "threshold:x", "threshold_top_k", "TOP_K:2", "top-k:2", "renormalize"],
)  # fmt: skip
def test_invalid_rule_error_lists_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not an inference rule; write dense, top_k:K") as caught:
        Rule.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_route_and_active_experts_agree(text: str, num_tokens: int) -> None:
    scores_TE, rule = random_scores(num_tokens, 5), Rule.parse(text)
    mask_TE = active_experts(scores_TE, rule)
    routing = route(scores_TE, rule)
    assert sets(routing, 5) == [set(row.nonzero()[:, 0].tolist()) for row in mask_TE]
    kept_TE = masked_scores(scores_TE, mask_TE, renormalize=rule.renormalize)
    torch.testing.assert_close(scattered_scores(routing, 5), kept_TE)
    torch.testing.assert_close(masked_route(scores_TE, rule).weights_TK, kept_TE)


@pytest.mark.parametrize("text", [rule for rule in RULES if "renormalize" in rule])
def test_renormalized_weights_sum_to_one(text: str) -> None:
    weights_TK = route(random_scores(9, 5), Rule.parse(text)).weights_TK
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(9))


@pytest.mark.parametrize("text", ["dense", "top_k:3", "threshold:0.5"])
def test_weights_equal_scores(text: str) -> None:
    scores_TE = random_scores(9, 5)
    routing = route(scores_TE, Rule.parse(text))
    padded_TE = torch.cat([scores_TE, torch.zeros(9, 1)], dim=1)
    torch.testing.assert_close(routing.weights_TK, padded_TE.gather(1, routing.ids_TK))


def test_threshold_keeps_best_expert() -> None:
    scores_TE = random_scores(9, 5)
    routing = route(scores_TE, Rule.parse("threshold:1e6"))
    assert routing.ids_TK.tolist() == scores_TE.argmax(-1, keepdim=True).tolist()
    assert (routing.weights_TK > 0).all()


def test_fewer_experts_are_padded() -> None:
    scores_TE = torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.4, 0.2], [0.34, 0.33, 0.33]])
    routing = route(scores_TE, Rule.parse("threshold:0.9"))
    assert sets(routing, 3) == [{0}, {0, 1}, {0, 1, 2}]
    padding_TK = routing.ids_TK == 3
    assert padding_TK.sum(-1).tolist() == [2, 1, 0]
    assert (routing.weights_TK[padding_TK] == 0).all()


@pytest.mark.parametrize(
    ("counts", "k"), [([1, 2], 2), ([1, 1, 2], 1), ([1, 2, 2], 2), ([1], 1), ([3, 2, 2, 3], 3)]
)
def test_threshold_top_k_rounds_the_mean_count_half_up(counts: list[int], k: int) -> None:
    # A token of count n has n experts of 0.3 and the rest near zero, against a bar of 0.2 * 4.
    scores_TE = torch.tensor([[0.3] * n + [0.01] * (4 - n) for n in counts])
    assert route(scores_TE, Rule.parse("threshold_top_k:0.8")).ids_TK.shape == (len(counts), k)


def test_padding_does_not_count_in_the_mean() -> None:
    scores_TE = torch.tensor([[0.9, 0.05, 0.05], [0.34, 0.33, 0.33], [0.34, 0.33, 0.33]])
    rule = Rule.parse("threshold_top_k:0.9")
    real_T = torch.tensor([True, False, False])
    assert route(scores_TE, rule).ids_TK.shape == (3, 2)
    assert route(scores_TE, rule, real_T).ids_TK.shape == (3, 1)
    assert active_experts(scores_TE, rule, real_T).sum(-1).tolist() == [1, 1, 1]
    nobody_T = torch.zeros(3, dtype=torch.bool)
    assert route(scores_TE, rule, nobody_T).ids_TK.shape == (3, 1)


def test_top_k_of_all_experts_is_dense() -> None:
    scores_TE = random_scores(9, 5)
    everyone, dense = (route(scores_TE, Rule.parse(text)) for text in ("top_k:5", "dense"))
    assert dense.ids_TK.tolist() == [[0, 1, 2, 3, 4]] * 9
    assert torch.equal(scattered_scores(everyone, 5), scattered_scores(dense, 5))


@pytest.mark.parametrize("text", RULES)
def test_empty_batch(text: str) -> None:
    routing = route(torch.empty(0, 5), Rule.parse(text))
    assert routing.ids_TK.shape[0] == routing.weights_TK.shape[0] == 0
    assert active_experts(torch.empty(0, 5), Rule.parse(text)).shape == (0, 5)


@pytest.mark.parametrize("choose", [route, active_experts])
def test_too_many_experts_raise(choose) -> None:
    with pytest.raises(ConfigError, match=r"asks for 6 .* there are 5; the most .* top_k:5"):
        choose(random_scores(2, 5), Rule.parse("top_k:6"))


@pytest.mark.parametrize("text", ["threshold_top_k:0.9", "threshold_top_k:1.5:renormalize"])
@pytest.mark.parametrize("real", [0, 1, 7, 17])
def test_route_and_active_experts_agree_about_padding(text: str, real: int) -> None:
    scores_TE, rule, real_T = random_scores(17, 5), Rule.parse(text), torch.arange(17) < real
    mask_TE = active_experts(scores_TE, rule, real_T)
    routing = route(scores_TE, rule, real_T)
    assert sets(routing, 5) == [set(row.nonzero()[:, 0].tolist()) for row in mask_TE]


@given(st.integers(0, 30), st.integers(1, 6), st.sampled_from(RULES), st.integers(0, 5))
def test_every_rule_gives_valid_routing(t: int, e: int, text: str, seed: int) -> None:
    rule = Rule.parse(text)
    if rule.k is not None and rule.k > e:
        return
    routing = route(random_scores(t, e, seed), rule)
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
    assert ids_TK.shape == weights_TK.shape
    assert ((ids_TK >= 0) & (ids_TK <= e)).all()
    assert torch.equal(ids_TK == e, weights_TK == 0)
    chosen = sets(routing, e)
    assert all(len(who) == (row < e).sum() for who, row in zip(chosen, ids_TK, strict=True))
    assert all(chosen)
