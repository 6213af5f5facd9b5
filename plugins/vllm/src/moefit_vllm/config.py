"""The configuration of a DS-MoE, as moefit writes it."""

from transformers import PreTrainedConfig


class DsMoeConfig(PreTrainedConfig):
    """Settings of the model; those of training are kept and not used."""

    model_type = "dsmoe"

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
    inference_rule: str = "dense"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
