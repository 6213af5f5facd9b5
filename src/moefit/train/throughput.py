"""The two sides of MFU (model FLOPs utilisation): FLOPs per token and the machine's peak."""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig

# Width of the square matrix product that is timed, and products per synchronisation. Synchronising
# after every product would leave a GPU idle between them.
CPU_PRODUCTS = (2048, 1)
_FIRST_WIDTH, _SHORT = 256, 0.02  # on a CPU, the width doubles while a product takes less seconds
CUDA_PRODUCTS = (8192, 10)


def training_flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Return FLOPs of matrix products per token, forward and backward, averaged over a sequence.

    For a DS-MoE this is `ModelCard.training_flops_per_token`. For OLMoE it is 6 per active matrix
    parameter plus 12 * layers * query width * context, where context is the mean number of
    positions under the causal mask, (seq_len + 1) / 2. Embedding look-ups cost nothing; a tied
    embedding counts once, as the head.
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
    query_width = config.hidden_size  # in OLMoE, heads times head width
    attention = config.num_hidden_layers * query_width * (seq_len + 1) / 2
    return 6.0 * (sum(matrices.values()) - unused - look_up) + 12.0 * attention


def measured_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of a large square matrix product, the denominator of MFU.

    Args:
        device: Where to measure.
        dtype: Of both matrices.
        seconds: Duration of the measurement.
    """
    width, repeats = CUDA_PRODUCTS
    if device.type != "cuda":
        width, repeats = _cpu_width(dtype), CPU_PRODUCTS[1]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    for _ in range(2):  # warm-up
        torch.mm(a, b)
    count, start = 0, _synchronized_time(device)
    while (elapsed := _synchronized_time(device) - start) < seconds or count == 0:
        for _ in range(repeats):
            torch.mm(a, b)
        count += repeats
    return count * 2 * width**3 / elapsed


def _cpu_width(dtype: torch.dtype) -> int:
    """Return the width to measure with: without matrix units, 16 bits may take a second for 512."""
    width = min(_FIRST_WIDTH, CPU_PRODUCTS[0])
    while width < CPU_PRODUCTS[0]:
        a_WW = torch.ones(width, width, dtype=dtype)
        torch.mm(a_WW, a_WW)  # warm-up
        start = time.perf_counter()
        torch.mm(a_WW, a_WW)
        if time.perf_counter() - start > _SHORT:
            break
        width *= 2
    return width


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
