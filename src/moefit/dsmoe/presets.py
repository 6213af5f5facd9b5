"""Model presets: the paper's Table 1 (arXiv 2404.05567), and small models for one machine.

These values are not in the paper:

- The router's hidden width of 512 in DS-MoE. The totals of all six sizes match it, and none matches
  a linear router. SMoE has the usual linear router, although its totals match 512 (1B, 1.5B) and
  1024 (5B) better; see tests/dsmoe/test_card.py.
- The vocabulary of 50257 (CodeGen's without its tokens for white space) and untied embeddings: both
  match the memory figures of Table 7.
- `threshold:0.48`, the only epsilon in the paper (Figure 5). For speed it uses top_k:6 (3B) and
  top_k:4 (6B).
- The weight 0.01 of SMoE's load-balancing loss, which is Switch Transformer's.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError

_Fields = Mapping[str, Any]

_DENSE: _Fields = {
    "num_experts": 1,
    "num_attention_experts": 1,
    "router_hidden_size": None,
    "training_rule": "dense",
    "inference_rule": "dense",
}
_DSMOE: _Fields = {"training_rule": "dense", "inference_rule": "threshold:0.48"}
_SMOE: _Fields = {
    "num_attention_experts": 1,
    "router_hidden_size": None,
    "load_balancing_loss_coef": 0.01,
}
_TOP_2: _Fields = {"training_rule": "top_k:2", "inference_rule": "top_k:2"}
_TOP_4: _Fields = {"training_rule": "top_k:4", "inference_rule": "top_k:4"}

_PAPER: _Fields = {
    "vocab_size": 50257,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "mlp_type": "gelu",
    "num_attention_heads": 32,
}
_PAPER_1B: _Fields = {
    **_PAPER,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
}
_PAPER_3B: _Fields = {
    **_PAPER,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
}
_PAPER_6B: _Fields = {
    **_PAPER,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
}
_PAPER_DSMOE: _Fields = {**_DSMOE, "num_experts": 32, "router_hidden_size": 512}

_TINY: _Fields = {
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "mlp_type": "swiglu",
    "qk_norm": True,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "intermediate_size": 32,
}
_SMALL: _Fields = {
    **_TINY,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "intermediate_size": 72,
}
# In short runs, small models need a larger alpha than the paper's to concentrate routing, and the
# factor to learn as fast as a dense model of their size: docs/lab-log.md.
_SMALL_DSMOE: _Fields = {**_DSMOE, "mlp_mi_loss_coef": 0.003, "routed_scaling_factor": 16.0}

_PRESETS: Mapping[str, _Fields] = {
    "dense-1b": {**_PAPER_1B, **_DENSE, "intermediate_size": 8192},
    "dense-3b": {**_PAPER_3B, **_DENSE, "intermediate_size": 12288},
    "dense-6b": {**_PAPER_6B, **_DENSE, "intermediate_size": 16384},
    "smoe-1b": {**_PAPER_1B, **_SMOE, **_TOP_2, "num_experts": 8, "intermediate_size": 1024},
    "smoe-1.5b": {**_PAPER_1B, **_SMOE, **_TOP_2, "num_experts": 12, "intermediate_size": 1024},
    "smoe-5b": {**_PAPER_3B, **_SMOE, **_TOP_2, "num_experts": 16, "intermediate_size": 1536},
    "dsmoe-1b": {
        **_PAPER_1B,
        **_PAPER_DSMOE,
        "num_attention_experts": 16,
        "intermediate_size": 256,
        "mlp_mi_loss_coef": 6.3e-4,
        "attention_mi_loss_coef": 3.5e-4,
    },
    "dsmoe-3b": {
        **_PAPER_3B,
        **_PAPER_DSMOE,
        "num_attention_experts": 8,
        "intermediate_size": 384,
        "mlp_mi_loss_coef": 4e-4,
        "attention_mi_loss_coef": 2e-4,
    },
    "dsmoe-6b": {
        **_PAPER_6B,
        **_PAPER_DSMOE,
        "num_attention_experts": 8,
        "intermediate_size": 512,
        "mlp_mi_loss_coef": 2e-4,
        "attention_mi_loss_coef": 2e-4,
    },
    "dense-tiny": {**_TINY, **_DENSE, "intermediate_size": 512},
    "dsmoe-tiny": {**_TINY, **_SMALL_DSMOE},
    "smoe-tiny": {**_TINY, **_SMOE, **_TOP_4},
    "dense-small": {**_SMALL, **_DENSE, "intermediate_size": 1152},
    "dsmoe-small": {**_SMALL, **_SMALL_DSMOE},
    "smoe-small": {**_SMALL, **_SMOE, **_TOP_4},
}


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, the paper's models first."""
    return tuple(_PRESETS)


def field_names() -> tuple[str, ...]:
    """Return the fields of DsMoeConfig that it does not inherit from transformers."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return tuple(field.name for field in fields(DsMoeConfig) if field.name not in inherited)


def preset(name: str, **overrides: Any) -> DsMoeConfig:
    """Return a preset's configuration with some fields replaced.

    Raises:
        ConfigError: The preset or a field is unknown, or the configuration is invalid.

    >>> preset("dsmoe-small", num_hidden_layers=2).num_hidden_layers
    2
    """
    if name not in _PRESETS:
        raise ConfigError(
            f"{name!r} is not a preset{_suggestion(name, preset_names())}; "
            f"use one of {', '.join(preset_names())}"
        )
    check_fields(overrides)
    return DsMoeConfig(**{**_PRESETS[name], **overrides})


def check_fields(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a key of `settings` is not a field of DsMoeConfig."""
    known = field_names()
    for field in settings:
        if field not in known:
            raise ConfigError(
                f"{field!r} is not a field of a model{_suggestion(field, known)}; "
                f"use one of {', '.join(known)}"
            )


def _suggestion(given: str, known: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(given, known, n=1)
    return f", did you mean {found[0]!r}?" if found else ""
