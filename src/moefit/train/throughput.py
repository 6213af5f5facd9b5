"""How fast a run is, against what the machine can do.

Owns the FLOPs of a training token and the measured ceiling, the two sides of MFU (model FLOPs
utilisation). For our own models the count is the model card's.
"""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig

# Width of the square product that is timed, and how many of them between two looks at the clock.
# A GPU's clock is read by waiting for it, and small products end before the next one is queued.
CPU_PRODUCTS = (2048, 1)
CUDA_PRODUCTS = (8192, 10)


def training_flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """FLOPs of matrix products per token, forward and backward, in the mean over a sequence.

    What `ModelCard.training_flops_per_token` says of a DS-MoE. For a stock OLMoE the same from
    its parameters: 6 per active matrix parameter and 12 * layers * query width * context. In
    both, context is the (seq_len + 1) / 2 positions that the causal mask leaves a token in the
    mean, an embedding look-up costs nothing, and a tied embedding counts once, as the head.
    """
    config = model.config
    if isinstance(config, DsMoeConfig):
        return model_card(config).training_flops_per_token(seq_len)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2}
    experts = sum(count for name, count in matrices.items() if ".experts." in name)
    unused = experts * (1 - config.num_experts_per_tok / config.num_experts)
    look_up = 0 if config.tie_word_embeddings else embedding.weight.numel()
    query_width = config.hidden_size  # OLMoE's heads divide it
    attention = config.num_hidden_layers * query_width * (seq_len + 1) / 2
    return 6.0 * (sum(matrices.values()) - unused - look_up) + 12.0 * attention


def measured_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product, the ceiling that MFU is a share of."""
    width, at_once = CUDA_PRODUCTS if device.type == "cuda" else CPU_PRODUCTS
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    for _ in range(2):  # the first loads kernels, the second finds caches and clocks warm
        torch.mm(a, b)
    count, start = 0, _now(device)
    while (elapsed := _now(device) - start) < seconds or count == 0:
        for _ in range(at_once):
            torch.mm(a, b)
        count += at_once
    return count * 2 * width**3 / elapsed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
