"""Schedules of learning rate, MI loss weight and sparse steps."""

import math
from fractions import Fraction

import torch

from moefit.train.settings import OptimizerConfig, SparseConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay or WSD.

    WSD (warm-up, stable, decay; arXiv 2404.06395) stays at the peak and decays linearly at the end.

    Args:
        step: Counted from 0.
        steps: Steps of the run.
        config: Peak, warm-up, schedule and final ratio.

    >>> round(learning_rate(0, 100, OptimizerConfig(lr=1.0, warmup_steps=10)), 3)
    0.1
    >>> learning_rate(9, 100, OptimizerConfig(lr=1.0, warmup_steps=10))
    1.0
    >>> stable = OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=0, final_lr_ratio=0)
    >>> [learning_rate(step, 10, stable) for step in (0, 8, 9, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        decaying = min(max(1, round(config.decay_share * steps)), steps - config.warmup_steps)
        left = min(1.0, max(0, steps - step) / max(1, decaying))
        return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def mi_scale(step: int, steps: int, ramp: tuple[float, float]) -> float:
    """Return the factor on the MI loss weights at a step, which rises linearly over the ramp.

    While it is zero, the model learns as a dense model of its size does. The loss then concentrates
    each token's routing on few experts.

    Args:
        step: Counted from 1.
        steps: Steps of the run.
        ramp: Start and end as fractions of the run.

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
    """Return whether a step, counted from 1, uses only the experts that the rule selects.

    >>> half = SparseConfig(rule="top_k:4", share=0.5, start=0.5)
    >>> [step for step in range(1, 13) if is_sparse(step, 12, half)]
    [8, 10, 12]
    """
    after = step - round(config.start * steps)
    if config.rule is None or after < 1:
        return False
    share = Fraction(config.share).limit_denominator(steps)
    return math.floor(after * share) > math.floor((after - 1) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = value
