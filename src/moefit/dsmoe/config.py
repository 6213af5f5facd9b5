"""What a DS-MoE model is made of, in transformers' configuration style.

Owns the fields, their defaults and the check that they don't contradict each other. One class
serves three kinds of model: a DS-MoE (all experts trained), a sparse MoE baseline
(`training_rule="top_k:2"`), and a plain dense model (`num_experts=1`).
"""

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from moefit.errors import ConfigError
from moefit.moe.routing import Rule

DEFAULT_OF_NULL = {
    "num_key_value_heads": ", or null to follow from the other heads",
    "head_dim": ", or null to follow from the width",
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
    *DEFAULT_OF_NULL,
)
LOSS_COEFFICIENTS = (
    "mlp_mi_loss_coef",
    "attention_mi_loss_coef",
    "load_balancing_loss_coef",
    "z_loss_coef",
)


class DsMoeConfig(PreTrainedConfig):
    """Configuration of `DsMoeModel`; sizes as in DS-MoE's Table 1.

    - `num_attention_heads`: query heads in all; with mixture-of-attention-heads (MoA) they are
      `num_attention_experts * num_key_value_heads`, N_att experts of N_head heads each.
    - `intermediate_size`: hidden width of *one* expert; the dense twin's is times `num_experts`.
    - `mlp_type`: `gelu` (two matrices, the paper) or `swiglu` (three).
    - `router_hidden_size`: None for a linear router, else the hidden width of a two-layer one.
    - `routed_scaling_factor`: multiplies the MLP experts' weights (DeepSeek's name). Scores over E
      experts start at 1 / E, and so does the MLP's share of what is learnt; a factor makes up.
    - `training_rule`, `inference_rule`: see `moefit.moe.routing.Rule`; which experts take part
      in `model.train()` and in `model.eval()`.
    - `*_loss_coef`: weights of the router losses, each summed over layers. alpha in the paper is
      `mlp_mi_loss_coef` and `attention_mi_loss_coef`.

    Raises ConfigError if sizes contradict each other.
    """

    model_type = "dsmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' class field

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
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = max(
                1, self.num_attention_heads // self.num_attention_experts
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
            nearest = _nearest_multiple(self.hidden_size, 2 * self.num_attention_heads)
            _require(
                self.head_dim * self.num_attention_heads == self.hidden_size,
                f"hidden_size={self.hidden_size} does not divide into num_attention_heads="
                f"{self.num_attention_heads}; the nearest that works is hidden_size={nearest}, "
                "or give head_dim",
            )
        self._check_heads()
        for rule in (self.training_rule, self.inference_rule):
            Rule.parse(rule).check(self.num_experts)
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            optional = name in DEFAULT_OF_NULL and value is None
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            fallback = DEFAULT_OF_NULL.get(name, "")
            _require(
                optional or whole,
                f"{name}={value!r}, but it must be a whole number from 1 on{fallback}",
            )
        _require(
            self.mlp_type in ("gelu", "swiglu"),
            f"mlp_type={self.mlp_type!r} is unknown; use 'gelu' or 'swiglu'",
        )
        for name in LOSS_COEFFICIENTS:
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value}, but a loss weight must be zero or more")

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
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}; the "
            f"nearest that works is num_attention_heads={_nearest_multiple(heads, kv_heads)}",
        )


def _nearest_multiple(value: int, step: int) -> int:
    return max(1, (value + step // 2) // step) * step


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
