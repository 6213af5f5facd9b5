"""AdamW, and Muon for the matrices of layers.

Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a
matrix by the nearest orthogonal one, approximately, by Newton-Schulz iterations. Stacked experts
are matrices of their own, and so are gate and up projections that share a tensor.

Shapes: M matrices, I rows, D columns.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moefit.moe.routing import at_least_float32
from moefit.train.settings import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of one iteration, which make singular values of 0.01 to 1 about 1 (Jordan)."""
ITERATIONS = 5
MOMENTUM = 0.95


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return the optimizer of a model, with weight decay on matrices and stacked experts only."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = {n for n, p in named if config.name == "muon" and _is_inner_matrix(n, p)}
    decayed = [p for n, p in named if p.ndim >= 2 and n not in muon]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    for parts in (1, 2):
        chosen = [p for n, p in named if n in muon and _parts(n) == parts]
        groups.append({"params": chosen, "weight_decay": config.weight_decay, "matrices": parts})
    groups = [group for group in groups if group["params"]]
    return Muon(groups, lr=config.lr, betas=config.betas, fused=True)


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates it: matrices between hidden states, not routers."""
    outside = ("embed_tokens", "lm_head", ".gate.")
    return parameter.ndim >= 2 and not any(part in name for part in outside)


def _parts(name: str) -> int:
    """Return how many matrices lie above each other in a (stacked) matrix."""
    return 2 if name.endswith("gate_up_proj") else 1


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for parameter groups with `matrices`: how many lie above each other.

    Updates have a root mean square of 0.2 times the rate, about that of AdamW's, so one rate fits
    both (arXiv 2502.16982, eq. 4). Sharded matrices are gathered, except stacked ones, of which
    each process has whole ones. Experts without a gradient, because no token reached them, are only
    decayed: their momentum would move them as far as a gradient does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have gradients."""
        assert closure is None
        held: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            if "matrices" not in group:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
                    held.append((parameter, parameter.grad))
                    parameter.grad = None  # nothing is left for AdamW
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(state["momentum"], MOMENTUM)  # Nesterov's
        update = _orthogonal_part(direction, group["matrices"])
        if parameter.ndim == 3:
            own_M = _here(gradient).flatten(1).any(1)
            _here(update).mul_(own_M[:, None, None])
        rows, columns = parameter.shape[-2] // group["matrices"], parameter.shape[-1]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def _orthogonal_part(direction: Tensor, parts: int) -> Tensor:
    """Return `orthogonalised` matrices, sharded as they are given."""
    if not isinstance(direction, DTensor):
        return orthogonalised(direction, parts)
    mesh, placements = direction.device_mesh, direction.placements
    local = direction.to_local()
    # Shards are along the first dimension: whole experts, if experts are stacked.
    if direction.ndim == 3:
        new = orthogonalised(local, parts) if local.numel() else torch.empty_like(local)
        return DTensor.from_local(
            new, mesh, placements, run_check=False, shape=direction.shape,
            stride=direction.stride(),
        )  # fmt: skip
    whole = orthogonalised(direction.full_tensor(), parts)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _here(tensor: Tensor) -> Tensor:
    """Return this process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalised(x: Tensor, parts: int = 1) -> Tensor:
    """Return matrices with the singular vectors of the given ones, and singular values of about 1.

    Args:
        x: [I, D] or [M, I, D].
        parts: Number of matrices of equal height above each other in each of these.
    """
    *_, rows, columns = x.shape
    y_MID = at_least_float32(x).reshape(-1, rows // parts, columns)
    is_tall = y_MID.shape[1] > columns
    if is_tall:
        y_MID = y_MID.mT
    y_MID = y_MID / y_MID.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram_MII = y_MID @ y_MID.mT
        y_MID = a * y_MID + (b * gram_MII + c * gram_MII @ gram_MII) @ y_MID
    return (y_MID.mT if is_tall else y_MID).reshape(x.shape).to(x.dtype)
