"""What `planner.py` compares plans with: fronts for bytes of slots, and SwapMoE's own planner.

SwapMoE's planner is a small network and a genetic search.

The network predicts quality from configurations that were measured. NSGA-II of pymoo crosses and
mutates configurations whose genes are one option per block, the policy and the format of the dense
weights. pymoo is optional (`pip install 'moefit[rivals]'`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.plan.configuration import Configuration
from moefit.plan.experiments import DENSE_FORMATS
from moefit.plan.fitting import Features, HeldOutError, held_out, held_out_error
from moefit.plan.planner import Planner
from moefit.plan.profile import Profile
from moefit.plan.quality import FLOOR, quality_samples
from moefit.plan.reference import Sample
from moefit.plan.search import Models, Point, allocator_points, pareto

_POPULATION, _GENERATIONS = 48, 25
_MAX_WAITS = 0.05  # experts that a token may wait for on average without counting as fetching


def front_for_slots(planner: Planner, nbytes: int, *, fetching: bool = True) -> list[Point]:
    """Return the Pareto front of configurations whose slots take at most `nbytes`.

    Args:
        planner: Of the model.
        nbytes: Of all slots.
        fetching: Whether configurations may be included that wait for experts, other than for
            one expert in twenty tokens.
    """
    points = allocator_points(planner.models, {DENSE_FORMATS[0]: nbytes})
    misses = planner.features.misses  # in virtual mode only while slots are empty
    return pareto(
        [
            one
            for one in points
            if fetching
            or one.configuration.mode == "virtual"
            or sum(misses(one.configuration)) < _MAX_WAITS
        ]
    )


def available() -> bool:
    """Return whether pymoo is installed."""
    return find_spec("pymoo") is not None


def search(
    models: Models,
    slot_budgets: Mapping[str, int],
    loss: Callable[[Configuration], float],
) -> list[Point]:
    """Return the Pareto front that the genetic search finds; empty if nothing fits.

    Args:
        models: The options of each block, and the latency model.
        slot_budgets: Bytes available for slots, by format of the dense weights.
        loss: Predicts the relative increase in perplexity of a configuration.
    """
    nsga2: Any = import_module("pymoo.algorithms.moo.nsga2")
    mutation: Any = import_module("pymoo.core.mutation")
    problem: Any = import_module("pymoo.core.problem")
    crossover: Any = import_module("pymoo.operators.crossover.ux")
    optimize: Any = import_module("pymoo.optimize")
    encoding = _Encoding(models, slot_budgets, loss)

    class Problem(problem.ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(
                n_var=len(encoding.upper),
                n_obj=2,
                n_ieq_constr=1,
                xl=0,
                xu=encoding.upper,
                vtype=int,
            )

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"], out["G"] = encoding.costs(x)

    class RandomReset(mutation.Mutation):
        def _do(self, _: Any, x_NV: np.ndarray, *, random_state: Any, **__: Any) -> np.ndarray:
            return encoding.mutate(x_NV, random_state)

    operators: dict[str, Any] = {  # pymoo annotates these with the classes of its defaults only
        "sampling": encoding.population(),
        "crossover": crossover.UniformCrossover(),
        "mutation": RandomReset(),
    }
    algorithm = nsga2.NSGA2(pop_size=_POPULATION, eliminate_duplicates=True, **operators)
    result = optimize.minimize(Problem(), algorithm, ("n_gen", _GENERATIONS), seed=0, verbose=False)
    if result.X is None:
        return []
    return pareto([encoding.point(x) for x in np.atleast_2d(result.X)])


class _Encoding:
    """Genes: the index of each block's option, of the policy and of the dense weights' format."""

    def __init__(
        self,
        models: Models,
        slot_budgets: Mapping[str, int],
        loss: Callable[[Configuration], float],
    ):
        self._models, self._slot_budgets, self._loss = models, slot_budgets, loss
        self._dense_formats = list(slot_budgets)
        self._names = list(models.by_policy[0].options)
        self._bytes = {
            name: np.array([option.nbytes for option in models.by_policy[0].options[name]])
            for name in self._names
        }
        sizes = [len(self._bytes[name]) for name in self._names]
        self.upper = np.array([*sizes, len(models.by_policy), len(self._dense_formats)]) - 1

    def costs(self, x: np.ndarray) -> tuple[list[float], list[float]]:
        """Return loss and seconds, and the excess over the slot budget as a share of it."""
        budget = self._slot_budgets[self._dense_formats[x[-1]]]
        nbytes = self._nbytes(x)
        if nbytes > budget:
            return [1e3, 1e3], [nbytes / max(budget, 1) - 1]
        point = self.point(x)
        return [point.loss, point.seconds], [-1.0]

    def point(self, x: np.ndarray) -> Point:
        """Decode genes."""
        field = self._models.by_policy[x[-2]]
        chosen = {
            name: field.options[name][gene] for name, gene in zip(self._names, x[:-2], strict=True)
        }
        configuration = field.configuration(chosen, self._dense_formats[x[-1]])
        return Point(
            configuration=configuration,
            loss=self._loss(configuration),
            seconds=self._models.latency.seconds(configuration),
            nbytes=self._nbytes(x),
            found_by="genetic search",
        )

    def _nbytes(self, x: np.ndarray) -> int:
        genes = zip(self._names, x[:-2], strict=True)
        return int(sum(self._bytes[name][gene] for name, gene in genes))

    def population(self) -> np.ndarray:
        """Draw the first generation."""
        shape = (_POPULATION, len(self.upper))
        return np.random.default_rng(0).integers(0, self.upper + 1, size=shape)

    def mutate(self, x_NV: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw 1.5 genes of each row anew, on average."""
        change_NV = generator.random(x_NV.shape) < 1.5 / len(self.upper)
        return np.where(change_NV, generator.integers(0, self.upper + 1, size=x_NV.shape), x_NV)


_WIDTH, _STEPS, _DECAY = 16, 400, 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkModel:
    """A two-layer network from logarithms of errors and moved router weight to log KL."""

    features: Features
    network: nn.Module
    mean_F: np.ndarray
    deviation_F: np.ndarray

    def divergence(self, configuration: Configuration) -> float:
        """Predict KL(full || configuration) in nats per token."""
        x_F = (_inputs(configuration, self.features) - self.mean_F) / self.deviation_F
        with torch.inference_mode():
            y = float(self.network(torch.from_numpy(x_F).float()))
        return max(0.0, float(np.exp(min(y, 3.0))) - FLOOR)  # beyond 20 nats nothing differs

    def loss(self, configuration: Configuration) -> float:
        """Predict the relative increase in perplexity."""
        return float(np.expm1(self.divergence(configuration)))


def fit_network(samples: Sequence[Sample], features: Features) -> NetworkModel:
    """Train on log(KL + `FLOOR`), all samples at each step."""
    x_NF = np.array([_inputs(sample.configuration, features) for sample in samples])
    y_N = np.log(np.maximum([sample.divergence for sample in samples], 0.0) + FLOOR)
    mean_F, deviation_F = x_NF.mean(0), x_NF.std(0) + 1e-6
    network = _trained(
        torch.from_numpy((x_NF - mean_F) / deviation_F).float(), torch.from_numpy(y_N).float()
    )
    return NetworkModel(features=features, network=network, mean_F=mean_F, deviation_F=deviation_F)


def network_error(profile: Profile, features: Features) -> HeldOutError:
    """Return the network's error on samples that it was not fitted to."""

    def fit(samples: Sequence[Sample]) -> Callable[[Sample], float]:
        model = fit_network(samples, features)
        return lambda sample: model.divergence(sample.configuration)

    samples = quality_samples(profile)
    measured = [sample.divergence for sample in samples]
    return held_out_error("two-layer network", held_out(fit, samples), measured, floor=FLOOR)


def _inputs(configuration: Configuration, features: Features) -> np.ndarray:
    noises = np.array(features.noises(configuration))
    moved = np.array(features.moved(configuration))
    mode = [float(configuration.mode == one) for one in ("bounded", "virtual")]
    return np.array(
        [
            *np.log(noises + 1e-5),
            *moved,
            moved.mean(),
            *mode,
            float(configuration.dense_precision != "native"),
        ]
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
