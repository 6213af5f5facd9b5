"""Routers by kernels: which are recognised, and that they choose as the family's own do."""

import copy
import pickle

import pytest
import torch
from levels import compiled, normal
from tiny_families import families, tiny_family
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.moe.routing import Routing
from moefit.moe.scoring import (
    Groups,
    KnownForms,
    RouterExample,
    ScoringRule,
    _in_kept_groups,
    identify,
)
from moefit.quant.cpu_kernels import kernels
from moefit.quant.layers.layer_operations import RoutingKernel, can_route
from moefit.serve.layer.router_kernels import RouterForward, router_form
from moefit.serve.layer.router_probe import _known_forms

pytestmark = compiled
RULES = {
    "OLMoE": ScoringRule(score="softmax", chosen="kept"),
    "Mixtral": ScoringRule(score="softmax", chosen="normalised"),
    "gpt-oss": ScoringRule(score="given", chosen="softmax", scale=0.5),
    "DeepSeek-V3": ScoringRule(
        score="sigmoid",
        chosen="normalised",
        biased=True,
        scale=2.5,
        groups=Groups(number=4, kept=2, score="top_2"),
    ),
    "DeepSeek-V2": ScoringRule(
        score="softmax", chosen="kept", scale=16.0, groups=Groups(number=8, kept=3, score="max")
    ),
    "logits with a bias": ScoringRule(
        score="sqrt_softplus", chosen="normalised", biased=True, by_logits=True
    ),
    "factors": ScoringRule(score="softmax", chosen="kept", factor_E=torch.rand(32)),
    "given": ScoringRule(score="given", chosen="kept"),
    "rounded": ScoringRule(score="softmax", chosen="kept", rounded=True),
}


def kernel(rule: ScoringRule, bias_E: Tensor, dtype: torch.dtype, chosen: int = 5) -> RoutingKernel:
    found = kernels()
    assert found is not None and can_route(rule, len(bias_E))
    return RoutingKernel(
        found,
        rule,
        bias_E,
        experts=len(bias_E),
        chosen=chosen,
        dtypes=(dtype, torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_choice_and_weights_are_those_of_the_rule(name, dtype) -> None:
    rule, bias_E = RULES[name], normal(32, seed=1) * 0.1
    logits_TE = (normal(60, 32) * 2).to(dtype)
    found = kernel(rule, bias_E, dtype)(logits_TE)
    like = Routing(torch.zeros(60, 5, dtype=torch.int64), torch.zeros(60, 5))
    wanted = rule.route(logits_TE, like, bias_E)
    clear = rule.preference(logits_TE, bias_E).topk(6).values.diff(dim=-1).lt(-1e-6).all(-1)
    assert clear.sum() > 5
    assert torch.equal(found.ids_TK[clear], wanted.ids_TK[clear])
    torch.testing.assert_close(found.weights_TK[clear], wanted.weights_TK[clear])
    exact = rule.weights(logits_TE.double().float(), found.ids_TK)
    if not rule.rounded:
        torch.testing.assert_close(found.weights_TK, exact, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("experts", [3, 8, 60, 128, 513])
def test_among_equal_experts_the_choice_is_that_of_torch(experts: int) -> None:
    """With few different values, so that most choices are among equals, and with many experts."""
    logits_TE = (normal(200, experts, seed=experts) * 2).round()
    for chosen in {1, 2, min(8, experts - 1), experts}:
        found = kernel(RULES["given"], torch.zeros(experts), torch.float32, chosen)(logits_TE)
        wanted = logits_TE.topk(chosen)
        assert torch.equal(found.ids_TK, wanted.indices)
        assert torch.equal(found.weights_TK, wanted.values)


def in_double(rule: ScoringRule, logits_TE: Tensor, bias_E: Tensor, chosen: int) -> Routing:
    """Compute a rule in float64 and float32, with the kernel's roundings at the same places."""
    x_TE = logits_TE.double()
    scores_TE = {
        "softmax": lambda: x_TE.softmax(-1).float(),
        "sigmoid": lambda: (1 / (1 + (-x_TE).exp())).float(),
        "sqrt_softplus": lambda: x_TE.exp().log1p().float().double().sqrt().float(),
        "given": logits_TE.float,
    }[rule.score]()
    if rule.rounded:
        scores_TE = scores_TE.to(logits_TE.dtype).float()
    selection_TE = logits_TE.float() if rule.by_logits else scores_TE
    selection_TE = selection_TE + bias_E if rule.biased else selection_TE
    if rule.groups:
        selection_TE = selection_TE.masked_fill(
            ~_in_kept_groups(selection_TE, rule.groups), -torch.inf
        )
    ids_TK = selection_TE.topk(chosen).indices
    if rule.chosen == "softmax":
        weights_TK = logits_TE.double().gather(-1, ids_TK).softmax(-1).float()
    else:
        weights_TK = scores_TE.gather(-1, ids_TK)
    if rule.chosen == "normalised":
        total_T = torch.zeros(len(logits_TE))
        for one_T in weights_TK.unbind(-1):
            total_T = total_T + one_T
        weights_TK = weights_TK / total_T[:, None].clamp_min(1e-20)
    if rule.factor_E is not None:
        weights_TK = weights_TK * rule.factor_E[ids_TK]
    return Routing(ids_TK, weights_TK * rule.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_bits_are_those_of_the_same_roundings(name, dtype) -> None:
    rule, bias_E = RULES[name], normal(32, seed=1) * 0.1
    logits_TE = (normal(301, 32) * 2).to(dtype)
    for chosen in (1, 6):
        found, wanted = (
            kernel(rule, bias_E, dtype, chosen)(logits_TE),
            in_double(rule, logits_TE, bias_E, chosen),
        )
        assert torch.equal(found.ids_TK, wanted.ids_TK)
        assert torch.equal(found.weights_TK, wanted.weights_TK)


def test_a_tokens_choice_does_not_depend_on_the_others() -> None:
    rule, bias_E = RULES["DeepSeek-V3"], normal(32, seed=1) * 0.1
    route, logits_TE = kernel(rule, bias_E, torch.float32), normal(600, 32)
    together = route(logits_TE)
    for first, last in ((0, 1), (7, 20), (100, 600)):
        part = route(logits_TE[first:last])
        assert torch.equal(part.ids_TK, together.ids_TK[first:last])
        assert torch.equal(part.weights_TK, together.weights_TK[first:last])


def test_logits_that_are_not_finite() -> None:
    logits_TE = normal(3, 8)
    logits_TE[0, 2], logits_TE[1, 5], logits_TE[2] = torch.nan, torch.inf, torch.nan
    for name in ("OLMoE", "gpt-oss", "Mixtral"):
        found = kernel(RULES[name], torch.zeros(8), torch.float32, chosen=3)(logits_TE)
        assert ((found.ids_TK >= 0) & (found.ids_TK < 8)).all()
        assert all(len(set(ids)) == 3 for ids in found.ids_TK.tolist())
        assert found.weights_TK.isnan().any(-1).all()


FAMILIES = [
    "olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "dots1",
    "jamba",
]  # fmt: skip


def routers_of(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if type(one).__name__.lower().endswith("topkrouter")]


def rule_of(
    router: nn.Module, x_TD: Tensor, known: KnownForms
) -> tuple[ScoringRule, Tensor | None] | None:
    """Return what `router_probe` finds for a router."""
    logits_TE, weights_TK, ids_TK = router(x_TD)
    vectors = [one for one in (*router.buffers(), *router.parameters()) if one.numel() == 8]
    example = RouterExample(
        logits_TE=logits_TE, routing=Routing(ids_TK, weights_TK), vectors=tuple(vectors)
    )
    found = identify(example, known)
    return found and (found.rule, None if found.bias is None else vectors[found.bias])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_routers_of_families_are_recognised(family, dtype) -> None:
    assert family in families()
    model = tiny_family(family).to(dtype)
    router = routers_of(model)[0]
    width = router.weight.shape[1]
    known = rule_of(router, normal(64, width, seed=5).to(dtype), _known_forms(model.config))
    assert known is not None, family
    form = router_form(router, *known, dtype)
    assert form is not None, family
    served, x_TD = RouterForward(router, form), normal(200, width, seed=9).to(dtype)
    made, own = served(x_TD), router(x_TD)
    assert [one.dtype for one in made] == [one.dtype for one in own]
    assert [one.shape for one in made] == [one.shape for one in own]
    same = (made[2].sort(-1).values == own[2].sort(-1).values).all(-1)
    assert same.float().mean() > 0.9  # but for ties
    together = served(x_TD)
    for one, whole in zip(served(x_TD[3:4]), together, strict=True):
        assert torch.equal(one, whole[3:4])


class Router(nn.Module):
    """OLMoE's router, or one that differs in what a test names."""

    def __init__(self, manner: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.manner = nn.Parameter(torch.randn(8, 16)), manner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(x if self.manner == "sequences" else x.reshape(-1, 16), self.weight)
        if self.manner == "squared logits":
            logits = logits**2
        if self.manner == "capped logits":
            logits = 20 * torch.tanh(logits / 20)
        scores = logits.softmax(-1, dtype=torch.float32)
        if self.manner == "scores are rounded":
            scores = scores.bfloat16().float()
        weights, ids = scores.topk(2)
        if self.manner == "scores are rounded":
            weights = logits.softmax(-1).gather(-1, ids)
        if self.manner == "other weights":
            weights = weights**2
        if self.manner == "more outputs":
            return logits, weights, ids, ids
        return logits, weights, ids


def test_a_rule_that_agreed_by_chance_is_not_used() -> None:
    groups = Groups(number=4, kept=1, score="max")
    rule = ScoringRule(score="softmax", chosen="kept", groups=groups)
    assert router_form(Router(), rule, None, torch.float32) is None


def test_other_routers_are_left_alone() -> None:
    rule = ScoringRule(score="softmax", chosen="kept")
    assert router_form(Router(), rule, None, torch.float32) is not None
    for manner in ("squared logits", "scores are rounded", "other weights", "more outputs"):
        assert router_form(Router(manner), rule, None, torch.float32) is None
    assert router_form(nn.Linear(16, 8), rule, None, torch.float32) is None
    other = ScoringRule(score="softmax", chosen="normalised")
    assert router_form(Router(), other, None, torch.float32) is None


def test_cap_that_common_inputs_do_not_reach_is_seen() -> None:
    rule = ScoringRule(score="softmax", chosen="kept")
    for manner, known in (("", True), ("capped logits", False)):
        router = Router(manner).bfloat16()
        router.weight.data *= 0.05
        assert (router_form(router, rule, None, torch.bfloat16) is not None) == known


@pytest.mark.parametrize("manner", ["", "sequences"])
def test_sequences_are_given_as_the_router_itself_would(manner: str) -> None:
    """A router that puts their tokens in a row is computed by kernels; another is left alone."""
    router, rule = Router(manner), ScoringRule(score="softmax", chosen="kept")
    form = router_form(router, rule, None, torch.float32)
    assert form is not None and form.flattens == (not manner)
    forward, x_BTD = RouterForward(router, form), normal(2, 3, 16)
    wanted = router if manner else forward
    with torch.no_grad():
        made = forward(x_BTD)
        own = wanted(x_BTD if manner else x_BTD.flatten(0, 1))
        assert all(torch.equal(a, b) for a, b in zip(made, own, strict=True))


def test_gradients_other_dtypes_and_copies() -> None:
    router, rule = Router(), ScoringRule(score="softmax", chosen="kept")
    form = router_form(router, rule, None, torch.float32)
    assert form is not None
    router.forward = RouterForward(router, form)
    x_TD = normal(3, 16)
    router(x_TD)[1].sum().backward()
    assert router.weight.grad is not None
    with torch.no_grad():
        wanted = router(x_TD)
        for made in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            assert all(torch.equal(a, b) for a, b in zip(made(x_TD), wanted, strict=True))
            made.weight.data = torch.zeros(8, 16)
            assert made(x_TD)[2].tolist() == torch.zeros(3, 8).topk(2).indices.tolist()
            assert torch.equal(router(x_TD)[2], wanted[2])


class GivenItsBias(nn.Module):
    """A router that its block gives the bias of its choice, like MiniMax-M2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(8, 32, seed=3))
        self.calls = 0

    def forward(self, x_TD: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        logits_TE = F.linear(x_TD, self.weight)
        scores_TE = logits_TE.sigmoid()
        ids_TK = (scores_TE + bias_E).topk(2).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


@torch.inference_mode()
def test_a_bias_that_a_block_gives_its_router() -> None:
    """With another bias than that of the example, the router's own code computes."""
    rule = ScoringRule(score="sigmoid", chosen="normalised", biased=True)
    module, bias_E, x_TD = GivenItsBias(), normal(8, seed=4), normal(9, 32)
    form = router_form(module, rule, bias_E, torch.float32)
    assert form is not None and form.takes_bias
    forward, module.calls = RouterForward(module, form), 0
    made = forward(x_TD, bias_E.view(8))
    assert not module.calls
    for one, other in zip(made, module(x_TD, bias_E), strict=True):
        torch.testing.assert_close(one, other)
    for number, others in enumerate(((bias_E.clone(),), (-bias_E,), (bias_E.double(),)), start=2):
        own = forward(x_TD, *others)
        assert module.calls == number
        assert torch.equal(own[2], (made[0].sigmoid() + others[0]).topk(2).indices)
    with pytest.raises(TypeError):
        forward(x_TD)
