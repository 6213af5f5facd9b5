"""Parameters, bytes and FLOPs of a DS-MoE, computed from its configuration.

Counts are of all layers together. FLOPs are those of matrix products, two per multiply-add, without
norms, activations, softmax, rotary positions and embedding look-ups.
"""

from dataclasses import dataclass
from typing import Any

from moefit.dsmoe.block import EMBEDDING_WIDTH
from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING, DsMoeConfig
from moefit.errors import ConfigError
from moefit.moe.routing import Rule, default_rules

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Number of parameters by part; `head` is 0 if it is tied to the embeddings."""

    embeddings: int
    head: int
    attention: int
    attention_routers: int
    mlp_experts: int
    mlp_routers: int
    norms: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts by part, in the order of the fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Parameters, bytes and FLOPs of one configuration.

    Attributes:
        parameters: By part.
        query_output: Parameters of query and output projections, which belong to single attention
            experts; keys and values are shared.
        vectors: Parameters outside matrices (norms, router biases).
        head_matrix: Size of the output matrix, whether tied or not.
        num_layers: Decoder layers.
        num_experts: MLP experts per layer.
        num_attention_experts: Attention experts per layer.
        query_width: Of all heads of a layer.
        key_value_width: Of all heads of a layer.
        kept_logit_bytes: Per token, in the KV cache beside keys and values.
        max_positions: Longest sequence.
        training_rule: Which experts are used in training.
        inference_rule: Which experts are used at inference.
    """

    parameters: Parameters
    query_output: int
    vectors: int
    head_matrix: int
    num_layers: int
    num_experts: int
    num_attention_experts: int
    query_width: int
    key_value_width: int
    kept_logit_bytes: int
    max_positions: int
    training_rule: Rule
    inference_rule: Rule

    @property
    def total(self) -> int:
        """All parameters; tied ones count once."""
        return sum(self.parameters.as_dict().values())

    @property
    def total_without_embeddings(self) -> int:
        """Parameters without input embeddings and head, as in DS-MoE's tables."""
        return self.total - self.parameters.embeddings - self.parameters.head

    def active(
        self,
        rule: Rule,
        mean_mlp_experts: float | None = None,
        mean_attention_experts: float | None = None,
    ) -> int:
        """Return the parameters that one token uses, without embeddings and head.

        Args:
            rule: The inference rule.
            mean_mlp_experts: Measured mean of active MLP experts per token and layer, for rules
                with a threshold.
            mean_attention_experts: The same of attention experts, for `threshold`.

        Raises:
            ConfigError: A mean is missing, out of range, or given for a rule that fixes it.
        """
        mlp = self._mlp_share(rule, mean_mlp_experts)
        attention = self._attention_share(rule, mean_attention_experts)
        saved = (1 - mlp) * self.parameters.mlp_experts + (1 - attention) * self.query_output
        return round(self.total_without_embeddings - saved)

    def forward_flops_per_token(
        self,
        rule: Rule,
        *,
        context: float,
        mean_mlp_experts: float | None = None,
        mean_attention_experts: float | None = None,
    ) -> float:
        """Return 2 * (active matrix parameters + head) + 4 * layers * query width * context.

        The second term counts attention scores and values. Inactive attention experts do not count,
        although `DsMoeAttention` computes them and multiplies by zero.

        Args:
            rule: The inference rule.
            context: Positions that the token attends to, including its own. Over a sequence of
                length T its mean is (T + 1) / 2.
            mean_mlp_experts: As for `active`.
            mean_attention_experts: As for `active`.

        Raises:
            ConfigError: As `active` does.
        """
        matrices = self.active(rule, mean_mlp_experts, mean_attention_experts) - self.vectors
        width = self._attention_share(rule, mean_attention_experts) * self.query_width
        return 2 * (matrices + self.head_matrix) + 4 * self.num_layers * width * context

    def training_flops_per_token(self, sequence_length: int) -> float:
        """Return the mean FLOPs of a forward and backward pass: three forward passes.

        A training rule with a threshold counts as dense. Recomputation by gradient checkpointing is
        not counted, as in MFU.
        """
        dense = _depends_on_text(self.training_rule)
        rule = Rule(kind="dense") if dense else self.training_rule
        return 3 * self.forward_flops_per_token(rule, context=(sequence_length + 1) / 2)

    def weight_bytes(self, dtype: str) -> int:
        """Return the bytes of all parameters; raises ConfigError for an unknown dtype."""
        return self.total * _dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Return the bytes of one token in the KV cache; raises as `weight_bytes` does."""
        keys_and_values = 2 * self.num_layers * self.key_value_width * _dtype_bytes(dtype)
        return keys_and_values + self.kept_logit_bytes

    def active_range(self, rule: Rule) -> tuple[int, int]:
        """Return the least and most parameters that `active` can return for any text."""
        mlp = 1 if _depends_on_text(rule) and self.num_experts > 1 else None
        attention = 1 if rule.kind == "threshold" and self.num_attention_experts > 1 else None
        least = self.active(rule, mlp, attention)
        return least, self.total_without_embeddings if _depends_on_text(rule) else least

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with active parameters by rule."""
        return {
            "parameters": self.parameters.as_dict(),
            "total": self.total,
            "total_without_embeddings": self.total_without_embeddings,
            "training_rule": str(self.training_rule),
            "inference_rule": str(self.inference_rule),
            "active_range_training": self.active_range(self.training_rule),
            "active_range_inference": self.active_range(self.inference_rule),
            "active": {
                str(rule): self.active_range(rule)
                for rule in (*default_rules(self.num_experts), self.inference_rule)
            },
            "weight_bytes": {dtype: self.weight_bytes(dtype) for dtype in DTYPE_BYTES},
            "kv_bytes_per_token": {dtype: self.kv_bytes_per_token(dtype) for dtype in DTYPE_BYTES},
            "sequence_length": self.max_positions,
            "training_flops_per_token": self.training_flops_per_token(self.max_positions),
        }

    def _mlp_share(self, rule: Rule, mean: float | None) -> float:
        """Return the fraction of active MLP experts."""
        if self.num_experts > 1 and _depends_on_text(rule):
            return _check_mean(mean, "mean_mlp_experts", self.num_experts, rule) / self.num_experts
        _reject_mean(mean, "mean_mlp_experts", self.num_experts, rule)
        rule.check(self.num_experts)
        return 1.0 if rule.k is None else rule.k / self.num_experts

    def _attention_share(self, rule: Rule, mean: float | None) -> float:
        """Return the fraction of active attention experts: all unless the rule is `threshold`."""
        experts = self.num_attention_experts
        if experts > 1 and rule.kind == "threshold":
            return _check_mean(mean, "mean_attention_experts", experts, rule) / experts
        _reject_mean(mean, "mean_attention_experts", experts, rule)
        return 1.0


def model_card(config: DsMoeConfig) -> ModelCard:
    """Return the card of a configuration."""
    head_dim, kv_heads = config.head_dim, config.num_key_value_heads
    assert head_dim is not None  # set by the configuration
    assert kv_heads is not None
    layers, width = config.num_hidden_layers, config.hidden_size
    query_width, key_value_width = config.num_attention_heads * head_dim, kv_heads * head_dim
    matrices = 3 if config.mlp_type == "swiglu" else 2
    embeddings = config.vocab_size * width
    norms = layers * 2 * width + width
    if config.qk_norm:
        norms += layers * (query_width + key_value_width)
    linear = config.router_type == "linear"
    mlp_router = _router(config, config.num_experts) if linear else 0
    if config.pregated == PREVIOUS_AND_EMBEDDING:
        mlp_router += EMBEDDING_WIDTH * config.num_experts * (width + 1 + config.num_experts)
    parameters = Parameters(
        embeddings=embeddings,
        head=0 if config.tie_word_embeddings else embeddings,
        attention=layers * 2 * width * (query_width + key_value_width),
        attention_routers=layers * _router(config, config.num_attention_experts),
        mlp_experts=layers * config.num_experts * matrices * width * config.intermediate_size,
        mlp_routers=layers * mlp_router,
        norms=norms,
    )
    biases = EMBEDDING_WIDTH * config.num_experts * (config.pregated == PREVIOUS_AND_EMBEDDING)
    routers = (config.num_experts > 1) + (config.num_attention_experts > 1)
    return ModelCard(
        parameters=parameters,
        query_output=layers * 2 * width * query_width,
        vectors=norms + layers * (routers * (config.router_hidden_size or 0) + biases),
        head_matrix=embeddings,
        num_layers=layers,
        num_experts=config.num_experts,
        num_attention_experts=config.num_attention_experts,
        query_width=query_width,
        key_value_width=key_value_width,
        kept_logit_bytes=config.kept_logit_bytes,
        max_positions=config.max_position_embeddings,
        training_rule=Rule.parse(config.training_rule),
        inference_rule=Rule.parse(config.inference_rule),
    )


def _router(config: DsMoeConfig, num_experts: int) -> int:
    """Return the parameters of one router, whose hidden layer has a bias."""
    if num_experts == 1:
        return 0
    hidden = config.router_hidden_size
    if hidden is None:
        return config.hidden_size * num_experts
    return (config.hidden_size + 1) * hidden + hidden * num_experts


def _depends_on_text(rule: Rule) -> bool:
    return rule.kind in ("threshold", "threshold_top_k")


def _check_mean(mean: float | None, name: str, experts: int, rule: Rule) -> float:
    if mean is None:
        raise ConfigError(
            f"the number of experts that {rule} activates depends on the text; "
            f"give {name}, a measured value between 1 and {experts}"
        )
    if not 1 <= mean <= experts:
        raise ConfigError(f"{name}={mean:g}, but it must be between 1 and {experts}")
    return mean


def _reject_mean(mean: float | None, name: str, experts: int, rule: Rule) -> None:
    if mean is not None:
        raise ConfigError(
            f"{name}={mean:g} was given, but {rule} with {experts} experts determines the number "
            f"of active experts; leave {name} out, or give a threshold rule"
        )


def _dtype_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{dtype!r} is not a known dtype; use {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
