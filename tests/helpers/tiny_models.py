"""Small random models with weights large enough for distinct routing."""

import torch
from torch import Tensor

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM

# On shared cores OpenMP's waiting threads cost ten times the work of tensors as small as these.
torch.set_num_threads(1)

VOCABULARY = 37
OLMOE = {  # `model` of a training configuration
    "architecture": "olmoe",
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
}


def tiny_config(**changes) -> DsMoeConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 5,
        "initializer_range": 0.4,
        "max_position_embeddings": 64,
    }
    return DsMoeConfig(**(sizes | changes))


def tiny_model(*, seed: int = 0, **changes) -> DsMoeForCausalLM:
    torch.manual_seed(seed)
    return DsMoeForCausalLM(tiny_config(**changes)).eval()


def set_biases(model: DsMoeForCausalLM) -> None:
    """Give routers biases, if they have some, that change what they choose."""
    generator = torch.Generator().manual_seed(3)
    for name, bias_E in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias_E.copy_(torch.rand(bias_E.shape, generator=generator) * 0.5)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(
        3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)
    )  # 0 to 2 are left for padding and the like


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
