from itertools import pairwise

import pytest
import torch

from moefit.train.optimizer import make_optimizer
from moefit.train.schedule import learning_rate
from moefit.train.settings import OptimizerConfig


def test_learning_rate_warmup_peak_and_end():
    config = OptimizerConfig(lr=1e-2, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[100] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_learning_rate_without_warmup():
    assert learning_rate(0, 10, OptimizerConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decayed, kept = make_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in kept["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
