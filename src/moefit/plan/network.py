"""SwapMoE's quality model: a small network of two layers, fitted to samples by least squares.

Owns what it is shown of a configuration (the paper shows slots per layer; here formats and moved
weight too) and its training. It knows no structure, so it is a candidate, not an allocator.

Shapes: N samples, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.plan.configuration import Configuration
from moefit.plan.features import Knowledge
from moefit.plan.quality import FLOOR
from moefit.plan.samples import Sample

_WIDTH, _STEPS, _DECAY = 16, 400, 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkModel:
    """KL of a configuration, by a network that sees logarithms of errors and moved weight."""

    knowledge: Knowledge
    network: nn.Module
    mean_F: np.ndarray
    deviation_F: np.ndarray
    name: str = "network of two layers"

    def divergence(self, configuration: Configuration) -> float:
        """KL(full || this), nats a token."""
        x_F = (_features(configuration, self.knowledge) - self.mean_F) / self.deviation_F
        with torch.inference_mode():
            y = float(self.network(torch.from_numpy(x_F).float()))
        return max(0.0, float(np.exp(min(y, 3.0))) - FLOOR)  # nobody asks beyond 20 nats


def fit_network(samples: Sequence[Sample], knowledge: Knowledge) -> NetworkModel:
    """Train on log(KL + floor), the whole of the samples at each step."""
    x_NF = np.array([_features(one.configuration, knowledge) for one in samples])
    y_N = np.log(np.maximum([one.divergence for one in samples], 0.0) + FLOOR)
    mean_F, deviation_F = x_NF.mean(0), x_NF.std(0) + 1e-6
    network = _trained(
        torch.from_numpy((x_NF - mean_F) / deviation_F).float(), torch.from_numpy(y_N).float()
    )
    return NetworkModel(
        knowledge=knowledge, network=network, mean_F=mean_F, deviation_F=deviation_F
    )


def _features(configuration: Configuration, knowledge: Knowledge) -> np.ndarray:
    noises = np.array(knowledge.noises(configuration))
    moved = np.array(knowledge.moved(configuration))
    mode = [float(configuration.mode == one) for one in ("bounded", "virtual")]
    return np.array(
        [*np.log(noises + 1e-5), *moved, moved.mean(), *mode, float(configuration.rest != "native")]
    )


def _trained(x_NF: Tensor, y_N: Tensor) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(x_NF.shape[1], _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))
    with torch.no_grad():
        network[2].bias.fill_(float(y_N.mean()))  # pyright: ignore
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=_DECAY)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        F.mse_loss(network(x_NF).view(-1), y_N).backward()
        optimizer.step()
    return network.eval()
