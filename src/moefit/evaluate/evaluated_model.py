"""Evaluate DS-MoE and OLMoE models under inference rules through one interface."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from transformers import OlmoeForCausalLM, PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeTopKRouter

from moefit.dsmoe.card import model_card
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.moe.routing import Rule, default_rules


class EvaluatedModel(Protocol):
    """A model that can be evaluated under an inference rule.

    Attributes:
        num_experts: MLP experts per layer.
        num_attention_experts: Attention experts per layer.
        total: Parameters without embeddings and head, as in the DS-MoE paper.
    """

    num_experts: int
    num_attention_experts: int
    total: int

    def check(self, rule: Rule) -> None:
        """Raise ConfigError or UnsupportedModelError if the model does not support the rule."""
        ...

    def use(self, rule: Rule) -> AbstractContextManager[None]:
        """Use the rule for the duration of the context."""
        ...

    def active(self, rule: Rule, mlp: float | None, attention: float | None) -> int:
        """Return the parameters of `total` that one token uses.

        Args:
            rule: The rule.
            mlp: Mean active MLP experts, for rules with a threshold.
            attention: Mean active attention experts, for `threshold`.
        """
        ...

    def default_rules(self) -> tuple[Rule, ...]:
        """Return the rules to compare by default."""
        ...


def evaluated_model(model: PreTrainedModel) -> EvaluatedModel:
    """Wrap a model for evaluation.

    Raises:
        UnsupportedModelError: It is neither a DS-MoE nor an OLMoE.
    """
    if isinstance(model, DsMoeForCausalLM):
        return EvaluatedDsMoe(model)
    if isinstance(model, OlmoeForCausalLM):
        return EvaluatedOlmoe(model)
    raise UnsupportedModelError(
        f"a {type(model).__name__} does not support inference rules; a DsMoeForCausalLM and "
        "an OlmoeForCausalLM do (give the model itself, not a compiled or wrapped one)"
    )


class EvaluatedDsMoe:
    """A DS-MoE, which supports every rule by which its routers can choose."""

    def __init__(self, model: DsMoeForCausalLM):
        self._model, self._card = model, model_card(model.config)
        self.num_experts = model.config.num_experts
        self.num_attention_experts = model.config.num_attention_experts
        self.total = self._card.total_without_embeddings

    def check(self, rule: Rule) -> None:
        """Raise ConfigError if the model's routers cannot choose by the rule."""
        self._model.config.check_rule(rule)

    @contextmanager
    def use(self, rule: Rule) -> Iterator[None]:
        """Set the rule in the configuration, which the model reads in each forward pass."""
        before = self._model.set_inference_rule(rule)
        try:
            yield
        finally:
            self._model.set_inference_rule(before)

    def active(self, rule: Rule, mlp: float | None, attention: float | None) -> int:
        """Return active parameters from the model card."""
        return self._card.active(rule, mlp, attention)

    def default_rules(self) -> tuple[Rule, ...]:
        """Return the rules to compare by default, of those that the model supports."""
        return tuple(rule for rule in default_rules(self.num_experts) if self._supports(rule))

    def _supports(self, rule: Rule) -> bool:
        try:
            self.check(rule)
        except ConfigError:
            return False
        return True


class EvaluatedOlmoe:
    """An OLMoE, which uses a fixed number of experts per token."""

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
        """Raise UnsupportedModelError for rules other than `dense` and `top_k`, else as DS-MoE."""
        if rule.kind not in ("dense", "top_k"):
            raise UnsupportedModelError(
                f"rule {rule}, but an OLMoE model uses the same number of experts for every "
                f"token; use dense or top_k:K with K from 1 to {self.num_experts}"
            )
        rule.check(self.num_experts)

    @contextmanager
    def use(self, rule: Rule) -> Iterator[None]:
        """Set K in the routers, which copied it from the configuration."""
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
        """Return the parameters of K experts per layer and all others."""
        assert mlp is None, "check() rejects rules with thresholds"
        assert attention is None
        share = (rule.k or self.num_experts) / self.num_experts
        return round(self.total - (1 - share) * self._experts)

    def default_rules(self) -> tuple[Rule, ...]:
        """Return the default rules that it supports, with the model's renormalisation."""
        renormalize = self._config.norm_topk_prob
        return tuple(
            Rule(kind=rule.kind, k=rule.k, renormalize=renormalize and rule.kind == "top_k")
            for rule in default_rules(self.num_experts)
            if rule.kind in ("dense", "top_k")
        )
