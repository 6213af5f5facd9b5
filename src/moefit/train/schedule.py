"""The learning rate of each step, and which parameters decay.

Also which steps are sparse, and AdamW's set-up. Knows nothing of losses or data.
"""

import math
from fractions import Fraction
from math import floor

import torch
from torch import nn

from moefit.train.config import OptimizerConfig, SparseConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear from 0 to the peak over the warm-up, then a cosine to final_lr_ratio of it.

    >>> round(learning_rate(0, 100, OptimizerConfig(lr=1.0, warmup_steps=10)), 3)
    0.1
    >>> learning_rate(9, 100, OptimizerConfig(lr=1.0, warmup_steps=10))
    1.0
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def mi_scale(step: int, steps: int, ramp: tuple[float, float]) -> float:
    """The share of the MI weights that is in force at `step`, rising linearly over the ramp.

    While it is zero the routers mix experts freely and the model learns as its dense twin does;
    what it has learnt is then concentrated in few experts as the learning rate falls.

    >>> [mi_scale(step, 100, (0.5, 0.9)) for step in (0, 50, 70, 90, 100)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    >>> mi_scale(0, 100, (0.0, 0.0))
    1.0
    """
    start, end = (share * steps for share in ramp)
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


def is_sparse(step: int, steps: int, config: SparseConfig) -> bool:
    """Whether only the chosen experts take part in `step`, counted from 1.

    >>> half = SparseConfig(rule="top_k:4", share=0.5, start=0.5)
    >>> [step for step in range(1, 13) if is_sparse(step, 12, half)]
    [8, 10, 12]
    """
    after = step - round(config.start * steps)
    if config.rule is None or after < 1:
        return False
    share = Fraction(config.share).limit_denominator(steps)
    return floor(after * share) > floor((after - 1) * share)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone.

    Experts are stacked [E, rows, columns], so every parameter of two dimensions or more is a
    matrix or a stack of them.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the learning rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
