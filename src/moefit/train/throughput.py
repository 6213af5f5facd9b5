"""How fast a run is, against what the machine can do.

Owns the FLOP formula and the measured ceiling behind MFU (model FLOPs utilisation).

Shapes: none; everything here is a scalar.
"""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from moefit.moe.routing import Rule


def training_flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """6 per active matrix parameter plus 12 * layers * heads * head width * seq_len.

    The formula of PaLM's appendix B (arXiv 2204.02311): attention without a discount for the
    causal mask. An embedding look-up costs nothing; a tied one counts once, as the head. Under
    sparse training only k of the E experts count.
    """
    config = model.config
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rule = Rule.parse(getattr(config, "training_rule", "dense"))
    tied = bool(config.tie_word_embeddings)
    parameters = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    parameters -= 0 if tied else embedding.weight.numel()
    if rule.k is not None:
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        parameters -= experts * (1 - rule.k / config.num_experts)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    return 6.0 * parameters + 12.0 * attention


def measured_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product of width 2048, the ceiling that MFU is a share of."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    count, start = 0, _now(device)
    while (elapsed := _now(device) - start) < seconds or count == 0:
        torch.mm(a, b)
        count += 1
    return count * 2 * 2048**3 / elapsed if elapsed else float("inf")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
