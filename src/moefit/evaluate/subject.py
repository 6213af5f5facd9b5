"""What evaluation needs of a model, whatever its family.

Owns how a model computes under an inference rule for a while, and what the rule costs. Two
families: our own, which knows rules, and transformers' OLMoE, which has one K in its routers.
Knows nothing of texts or scores.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from transformers import OlmoeForCausalLM, PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeTopKRouter

from moefit.dsmoe.card import model_card
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import UnsupportedModelError
from moefit.moe.routing import Rule, default_rules


class EvaluatedModel(Protocol):
    """A model that can be used under an inference rule.

    `total` counts parameters without embeddings and head, as the DS-MoE paper does.
    """

    num_experts: int
    num_attention_experts: int
    total: int

    def check(self, rule: Rule) -> None:
        """Raise ConfigError or UnsupportedModelError if the model cannot compute under `rule`."""
        ...

    def use(self, rule: Rule) -> AbstractContextManager[None]:
        """Compute under `rule` within the block; afterwards as before."""
        ...

    def active(self, rule: Rule, mlp: float | None, attention: float | None) -> int:
        """Of `total`, what one token uses. A mean number of experts where the text decides it."""
        ...

    def default_rules(self) -> tuple[Rule, ...]:
        """What to compare if nobody says."""
        ...


def evaluated_model(model: PreTrainedModel) -> EvaluatedModel:
    """The `Subject` of a model. Raises UnsupportedModelError if its family isn't known here."""
    if isinstance(model, DsMoeForCausalLM):
        return EvaluatedDsMoe(model)
    if isinstance(model, OlmoeForCausalLM):
        return EvaluatedOlmoe(model)
    raise UnsupportedModelError(
        f"a {type(model).__name__} cannot be put under an inference rule; a DsMoeForCausalLM and "
        "an OlmoeForCausalLM can (give the model itself, not a compiled or wrapped one)"
    )


class EvaluatedDsMoe:
    """Our own model: every rule."""

    def __init__(self, model: DsMoeForCausalLM):
        self._model, self._card = model, model_card(model.config)
        self.num_experts = model.config.num_experts
        self.num_attention_experts = model.config.num_attention_experts
        self.total = self._card.total_without_embeddings

    def check(self, rule: Rule) -> None:
        """Any rule that asks for no more experts than there are."""
        rule.check(self.num_experts)

    @contextmanager
    def use(self, rule: Rule) -> Iterator[None]:
        """Through the configuration, where the model looks at every call."""
        before = self._model.set_inference_rule(rule)
        try:
            yield
        finally:
            self._model.set_inference_rule(before)

    def active(self, rule: Rule, mlp: float | None, attention: float | None) -> int:
        """As the model's card has it."""
        return self._card.active(rule, mlp, attention)

    def default_rules(self) -> tuple[Rule, ...]:
        """The whole ladder."""
        return default_rules(self.num_experts)


class EvaluatedOlmoe:
    """transformers' OLMoE: a fixed K, all experts included, and no threshold."""

    num_attention_experts = 1

    def __init__(self, model: OlmoeForCausalLM):
        self._config = model.config
        self._routers = [m for m in model.modules() if isinstance(m, OlmoeTopKRouter)]
        self.num_experts = model.config.num_experts
        outside = {model.model.embed_tokens.weight, model.lm_head.weight}
        self.total = sum(p.numel() for p in model.parameters() if p not in outside)
        experts = [m for m in model.modules() if isinstance(m, OlmoeExperts)]
        self._experts = sum(p.numel() for one in experts for p in one.parameters())

    def check(self, rule: Rule) -> None:
        """`dense` and `top_k`, with or without renormalize.

        Raises UnsupportedModelError for other kinds, ConfigError for more experts than there are.
        """
        if rule.kind not in ("dense", "top_k"):
            raise UnsupportedModelError(
                f"rule {rule}, but an OLMoE model uses the same number of experts for every "
                f"token; use dense or top_k:K with K from 1 to {self.num_experts}"
            )
        rule.check(self.num_experts)

    @contextmanager
    def use(self, rule: Rule) -> Iterator[None]:
        """In the routers, which took K from the configuration when they were made."""
        self.check(rule)
        before = [(router.top_k, router.norm_topk_prob) for router in self._routers]
        try:
            for router in self._routers:
                router.top_k = rule.k or self.num_experts
                router.norm_topk_prob = rule.renormalize
            yield
        finally:
            for router, (k, renormalize) in zip(self._routers, before, strict=True):
                router.top_k, router.norm_topk_prob = k, renormalize

    def active(self, rule: Rule, mlp: float | None, attention: float | None) -> int:
        """K of the E experts, and all that is no expert."""
        assert mlp is None, "check() lets no rule through that leaves a mean open"
        assert attention is None
        share = (rule.k or self.num_experts) / self.num_experts
        return round(self.total - (1 - share) * self._experts)

    def default_rules(self) -> tuple[Rule, ...]:
        """The part of the ladder that it can compute, normalised as the model itself is."""
        renormalize = self._config.norm_topk_prob
        return tuple(
            Rule(kind=rule.kind, k=rule.k, renormalize=renormalize and rule.kind == "top_k")
            for rule in default_rules(self.num_experts)
            if rule.kind in ("dense", "top_k")
        )
