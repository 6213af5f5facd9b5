"""Configuration of DS-MoE models, in transformers' style.

A configuration that passes these checks can be built. The same class describes sparse MoE baselines
(`training_rule="top_k:2"`) and plain dense models (`num_experts=1`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from moefit.errors import ConfigError
from moefit.moe.routing import Rule

NULLABLE = {
    "num_key_value_heads": ", or null to derive it from the other heads",
    "head_dim": ", or null to derive it from the width",
    "router_hidden_size": ", or null for a linear router",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_attention_experts",
    "num_experts",
    "max_position_embeddings",
    *NULLABLE,
)
FLAGS = (
    "qk_norm",
    "score_correction_bias",
    "use_cache",
    "output_router_logits",
    "tie_word_embeddings",
)
PREVIOUS_TOKEN = "previous_token"  # a value of `pregated`
PREVIOUS_AND_EMBEDDING = "previous_token_and_embedding"  # another
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_Bound = tuple[Callable[[float], bool], str]
_AT_LEAST_0: _Bound = (lambda value: value >= 0, "a number of at least 0")
_ABOVE_0: _Bound = (lambda value: value > 0, "a number above 0")
NUMBERS: Mapping[str, _Bound] = {
    "routed_scaling_factor": _ABOVE_0,
    "mlp_mi_loss_coef": _AT_LEAST_0,
    "attention_mi_loss_coef": _AT_LEAST_0,
    "load_balancing_loss_coef": _AT_LEAST_0,
    "z_loss_coef": _AT_LEAST_0,
    "initializer_range": _ABOVE_0,
    "rms_norm_eps": _ABOVE_0,
    "attention_dropout": (lambda value: 0 <= value < 1, "a number of at least 0 and below 1"),
}
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


class DsMoeConfig(PreTrainedConfig):
    """Configuration of `DsMoeModel`; sizes as in DS-MoE's Table 1.

    Args:
        num_attention_heads: Query heads of a layer. With a mixture of attention heads (MoA) these
            are `num_attention_experts * num_key_value_heads`, N_att experts of N_head heads each.
        intermediate_size: Hidden width of one expert.
        mlp_type: `gelu` (two matrices, as in the paper) or `swiglu` (three).
        router_type: Of MLP experts: `linear`; `grap`, LocMoE's grouped average pooling, which has
            no weights, and `num_experts` then divides `hidden_size`; or `hash`, by which a token's
            id alone decides its one expert (arXiv 2106.04426).
        score_correction_bias: Whether the routers of MLP experts have a bias (DeepSeek-V3's name)
            that is added to scores where the k best are chosen, and not to their weights. Training
            moves it so that loads become even (arXiv 2408.15664).
        pregated: Whether experts are known early. True: the router of each block but the first is
            given the inputs of the block before (Pre-gated MoE, arXiv 2308.12066).
            `previous_token`: each token is routed by the router's logits for the token before, so
            that the experts of all blocks are known before a step (as in Edge0, arXiv 2609.18063).
            Weights have the same names and shapes in all of these.
            `previous_token_and_embedding`: the same, and two layers of each router add what they
            make of the token's own embedding, which is known as early.
        router_hidden_size: Hidden width of a two-layer router; None for a linear router.
        routed_scaling_factor: Factor on the MLP experts' weights (DeepSeek's name). It compensates
            for scores that start at 1 / E.
        training_rule: Which experts are used in train mode; see `moefit.moe.routing.Rule`.
        inference_rule: Which experts are used in eval mode.
        mlp_mi_loss_coef: Weight of a router loss, summed over layers; so are the other
            `*_loss_coef`. It and `attention_mi_loss_coef` are alpha in the paper.

    Raises:
        ConfigError: A field has an invalid value, or sizes contradict each other.
    """

    model_type = "dsmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers' class field

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_attention_experts: int = 1
    num_experts: int = 16
    mlp_type: str = "swiglu"
    router_type: str = "linear"
    score_correction_bias: bool = False
    pregated: bool | str = False
    router_hidden_size: int | None = None
    qk_norm: bool = False
    routed_scaling_factor: float = 1.0
    training_rule: str = "dense"
    inference_rule: str = "dense"
    mlp_mi_loss_coef: float = 0.0
    attention_mi_loss_coef: float = 0.0
    load_balancing_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    use_cache: bool = True
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_values()
        self._check_tokens()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = max(
                1, self.num_attention_heads // self.num_attention_experts
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
            nearest = nearest_multiple(self.hidden_size, 2 * self.num_attention_heads)
            _require(
                self.head_dim * self.num_attention_heads == self.hidden_size,
                f"hidden_size={self.hidden_size} does not divide into num_attention_heads="
                f"{self.num_attention_heads}; the nearest that works is hidden_size={nearest}, "
                "or give head_dim",
            )
        self._check_heads()
        self._check_choice()
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # transformers writes into it
        super().__post_init__(**kwargs)
        self._check_rope()

    def _check_values(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            is_null = name in NULLABLE and value is None
            alternative = NULLABLE.get(name, "")
            _require(
                is_null or (_is_integer(value) and value > 0),
                f"{name}={value!r}, but it must be an integer of at least 1{alternative}",
            )
        for name, (in_range, words) in NUMBERS.items():
            value = getattr(self, name)
            valid = _is_number(value) and in_range(value)
            _require(valid, f"{name}={value!r}, but it must be {words}")
        for name in FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name}={value!r}, but it must be true or false")
        _require(
            self.mlp_type in ("gelu", "swiglu"),
            f"mlp_type={self.mlp_type!r} is unknown; use 'gelu' or 'swiglu'",
        )
        self._check_router()
        for name in ("training_rule", "inference_rule"):
            value = getattr(self, name)
            _require(
                isinstance(value, str),
                f"{name}={value!r}, but it must be text, such as 'dense' or 'top_k:4'",
            )
        _require(
            self.rope_parameters is None or isinstance(self.rope_parameters, dict),
            f"rope_parameters={self.rope_parameters!r}, but it must be a mapping, such as "
            "{rope_theta: 10000.0}, or null",
        )

    @property
    def by_token_before(self) -> bool:
        """Return whether tokens are routed by the logits of the token before."""
        return self.pregated in (PREVIOUS_TOKEN, PREVIOUS_AND_EMBEDDING)

    @property
    def kept_logit_bytes(self) -> int:
        """Return the bytes per token that are kept of router logits beside keys and values."""
        if not self.by_token_before:
            return 0
        return self.num_hidden_layers * self.num_experts * 4  # in float32

    def _check_pregated(self) -> None:
        _require(
            isinstance(self.pregated, bool) or self.by_token_before,
            f"pregated={self.pregated!r}, but it must be true, false, {PREVIOUS_TOKEN!r} or "
            f"{PREVIOUS_AND_EMBEDDING!r}",
        )
        _require(
            self.pregated is not True or (self.num_experts > 1 and self.num_hidden_layers > 1),
            f"pregated=True lets a block choose the experts of the next one, but num_experts="
            f"{self.num_experts} and num_hidden_layers={self.num_hidden_layers}; give both 2 or "
            "more, or pregated=false",
        )
        _require(
            not self.by_token_before or self.num_experts > 1,
            f"pregated={self.pregated!r} lets a token choose the experts of the next one, but "
            f"num_experts={self.num_experts}; give 2 or more, or pregated=false",
        )

    def _check_router(self) -> None:
        self._check_pregated()
        _require(
            self.router_type in ("linear", "grap", "hash"),
            f"router_type={self.router_type!r} is unknown; use 'linear', 'grap' or 'hash'",
        )
        if self.router_type == "linear":
            return
        _require(
            self.num_experts > 1 and self.router_hidden_size is None,
            f"router_type={self.router_type!r} has no hidden layer and needs several experts, but "
            f"num_experts={self.num_experts} and router_hidden_size={self.router_hidden_size}; "
            "give num_experts=2 or more and router_hidden_size=null, or router_type='linear'",
        )
        if self.router_type == "hash":
            _require(
                not self.pregated,
                f"router_type='hash' knows the experts of a token by its id, so pregated="
                f"{self.pregated!r} has no effect; give pregated=false",
            )
            return
        _require(
            self.pregated != PREVIOUS_AND_EMBEDDING,
            f"pregated={PREVIOUS_AND_EMBEDDING!r} gives routers weights for the embedding, but "
            "router_type='grap' has none; give router_type='linear', or "
            f"pregated={PREVIOUS_TOKEN!r}",
        )
        nearest = nearest_multiple(self.hidden_size, self.num_experts)
        _require(
            self.hidden_size % self.num_experts == 0,
            f"router_type='grap' divides hidden_size={self.hidden_size} into num_experts="
            f"{self.num_experts} equal slices; the nearest that works is hidden_size={nearest}",
        )

    def _check_choice(self) -> None:
        for name in ("training_rule", "inference_rule"):
            self.check_rule(Rule.parse(getattr(self, name)), name)
        _require(
            not self.score_correction_bias or (self.num_experts > 1 and self.router_type != "hash"),
            f"score_correction_bias=True needs routers that choose by scores, but num_experts="
            f"{self.num_experts} and router_type={self.router_type!r}; give num_experts=2 or more "
            "and router_type='linear' or 'grap', or score_correction_bias=false",
        )

    def check_rule(self, rule: Rule, name: str = "inference_rule") -> None:
        """Raise ConfigError if the model's routers cannot choose by a rule.

        Args:
            rule: The rule.
            name: The field that it is for.
        """
        rule.check(self.num_experts)
        _require(
            self.router_type != "hash" or rule.k == 1,
            f"router_type='hash' gives each token one expert, but {name}={str(rule)!r}; give "
            f"{name}='top_k:1', or router_type='linear'",
        )
        _require(
            not self.score_correction_bias or rule.kind in ("top_k", "threshold_top_k"),
            f"score_correction_bias=True changes which experts are the best, but {name}="
            f"{str(rule)!r} does not choose the best; give {name}='top_k:K'",
        )

    def _check_tokens(self) -> None:
        for name in TOKENS:
            value = getattr(self, name)
            is_list = name == "eos_token_id" and isinstance(value, list)
            ids = value if is_list else [] if value is None else [value]
            _require(
                all(_is_integer(token) and token >= 0 for token in ids),
                f"{name}={value!r}, but it must be an integer of at least 0, or null",
            )
        _require(
            self.pad_token_id is None or self.pad_token_id < self.vocab_size,
            f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}; the "
            f"largest that works is {self.vocab_size - 1}",
        )

    def _check_rope(self) -> None:
        """Check rotary parameters after transformers has standardised their names."""
        rope: Mapping[str, Any] = self.rope_parameters or {}
        kind = rope.get("rope_type")
        _require(
            kind in ROPE_TYPES,
            f"rope_parameters.rope_type={kind!r} is unknown; use one of {', '.join(ROPE_TYPES)}",
        )
        for name in ("rope_theta", "factor"):
            value = rope.get(name, 1)
            _require(
                _is_number(value) and value > 0,
                f"rope_parameters.{name}={value!r}, but it must be a number above 0",
            )
        try:
            self.validate_rope()
        except (KeyError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise ConfigError(
                f"rope_parameters={dict(rope)} are invalid: {reason}; add what is missing, or use "
                "rope_type: default, which needs no further parameters"
            ) from error

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        experts, head_dim = self.num_attention_experts, self.head_dim
        assert kv_heads is not None
        assert head_dim is not None
        _require(
            head_dim % 2 == 0,
            f"head_dim={head_dim} is odd, but rotary embeddings need pairs; the nearest that "
            f"works is head_dim={head_dim + 1}",
        )
        if experts > 1:
            _require(
                heads == experts * kv_heads,
                f"num_attention_heads={heads} is not num_attention_experts={experts} times "
                f"num_key_value_heads={kv_heads}; the nearest that works is "
                f"num_attention_heads={experts * kv_heads}",
            )
        _require(
            heads % kv_heads == 0,
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; the "
            f"nearest that works is num_attention_heads={nearest_multiple(heads, kv_heads)}",
        )


def nearest_multiple(value: int, step: int) -> int:
    """Return the multiple of `step` nearest to `value`, at least `step`."""
    return max(1, (value + step // 2) // step) * step


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
