"""MLP experts of a DS-MoE in vLLM.

Gated experts of three matrices are computed by vLLM's fused path. It takes GELU experts of two
matrices on GPUs alone; elsewhere they are computed expert by expert.

Shapes: T tokens, D model width, E experts, F expert width, K experts of a token.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.platforms import current_platform

from moefit_vllm.routing import Rule

logger = init_logger(__name__)


class DsMoeRouter(nn.Module):
    """Logits of experts by a linear or two-layer router, in float32."""

    def __init__(self, config, num_experts: int):
        super().__init__()
        width = config.router_hidden_size
        self.hidden = None if width is None else nn.Linear(config.hidden_size, width)
        self.weight = nn.Parameter(torch.empty(num_experts, width or config.hidden_size))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return logits [T, E]."""
        x_TD = x_TD.float()
        if self.hidden is not None:
            x_TD = F.linear(x_TD, self.hidden.weight.float(), self.hidden.bias.float())
            x_TD = F.gelu(x_TD)
        return F.linear(x_TD, self.weight.float())


class DsMoeBlock(nn.Module):
    """A router with its experts, or a single expert without a router."""

    def __init__(self, config, prefix: str):
        super().__init__()
        self.rule = Rule.parse(config.inference_rule)
        self.scale = config.routed_scaling_factor
        self.gate = DsMoeRouter(config, config.num_experts) if config.num_experts > 1 else None
        fused = config.num_experts > 1 and (config.mlp_type == "swiglu" or fused_takes_gelu())
        logger.info_once(
            "DS-MoE experts: %s", "vLLM's fused path" if fused else "one expert at a time"
        )
        if not fused:
            self.experts = LoopedExperts(config)
            return
        self.experts = FusedExperts(
            config, self.rule.slots(config.num_experts), self._route, prefix
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output [T, D]."""
        if self.gate is None:
            ones_T1 = x_TD.new_ones((len(x_TD), 1), dtype=torch.float32)
            return self.experts(x_TD, ones_T1, torch.zeros_like(ones_T1, dtype=torch.long))
        logits_TE = self.gate(x_TD)
        if isinstance(self.experts, FusedExperts):
            return self.experts(x_TD, logits_TE)
        return self.experts(x_TD, *self._weights(logits_TE))

    def _weights(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, ids_TK = self.rule.route(logits_TE.float().softmax(-1))
        return weights_TK * self.scale, ids_TK

    def _route(self, hidden_states, gating_output, topk, renormalize):
        """Route as vLLM's fused path asks for it."""
        weights_TK, ids_TK = self._weights(gating_output)
        return weights_TK.float(), ids_TK.to(torch.int32)


def fused_takes_gelu() -> bool:
    """Return whether vLLM's fused path computes experts without a gate, by its Triton kernels."""
    return current_platform.is_cuda_alike()


class FusedExperts(nn.Module):
    """Experts by vLLM's fused path: gate and up [E, 2F, D], or up [E, F, D]; down [E, D, F]."""

    def __init__(self, config, slots: int, route, prefix: str):
        super().__init__()
        gated = config.mlp_type == "swiglu"
        self.fused = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=slots,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=False,
            custom_routing_function=route,
            activation="silu" if gated else "gelu_tanh_no_mul",
            ckpt_names=("gate_proj", "down_proj", "up_proj" if gated else None),
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs [T, D]."""
        return self.fused(hidden_states=x_TD, router_logits=logits_TE)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load stacked matrices; return the names of the parameters that are now loaded."""
        first = "w13_weight"
        targets = {"gate_up_proj": first, "up_proj": first, "down_proj": "w2_weight"}
        own = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            full = next(one for one in own if one.endswith(targets[name]))
            own[full].data.copy_(_part(name, tensor))
            loaded.add(full)
        return loaded


def _part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of F: rows of (gate and) up [E, F, D], or columns of down."""
    parts, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if parts == 1:
        return tensor
    if name == "down_proj":
        return tensor.chunk(parts, dim=2)[rank]
    if name == "up_proj":
        return tensor.chunk(parts, dim=1)[rank]
    return torch.cat([half.chunk(parts, dim=1)[rank] for half in tensor.chunk(2, dim=1)], dim=1)


class LoopedExperts(nn.Module):
    """Experts computed one by one: up [E, F, D], or gate and up [E, 2F, D]; down [E, D, F].

    With tensor parallelism each process computes all of them.
    """

    def __init__(self, config):
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gated = config.mlp_type == "swiglu"
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        else:
            self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(
        self, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs [T, D]."""
        if len(self.down_proj) == 1:  # without shapes that depend on data, for CUDA graphs
            return F.linear(self._hidden(x_TD, 0), self.down_proj[0]) * weights_TK.to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in range(len(self.down_proj)):
            weight_T = (weights_TK * (ids_TK == expert)).sum(-1)
            rows = weight_T.nonzero()[:, 0]
            if len(rows):
                out = F.linear(self._hidden(x_TD[rows], expert), self.down_proj[expert])
                y_TD.index_add_(0, rows, out.float() * weight_T[rows, None])
        return y_TD.to(x_TD.dtype)

    def _hidden(self, x_RD: torch.Tensor, expert: int) -> torch.Tensor:
        if self.gated:
            gate, up = F.linear(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(F.linear(x_RD, self.up_proj[expert]), approximate="tanh")
