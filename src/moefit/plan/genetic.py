"""SwapMoE's search: configurations as genes, crossed and mutated, by NSGA-II of pymoo.

Owns the coding (one option a block, the policy, the rest's format) and the run. It begins with what
the allocator found, so that it can only add to it. pymoo is an optional dependency.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from moefit.plan.search import Models, Point

_POPULATION, _GENERATIONS = 48, 25


def available() -> bool:
    """Whether pymoo is installed."""
    return find_spec("pymoo") is not None


def nsga2_search(
    models: Models, slot_budgets: Mapping[str, int], front: Sequence[Point]
) -> list[Point]:
    """Points that the genetic search found within the rooms; none without pymoo."""
    if not available() or not front:
        return []
    nsga2: Any = import_module("pymoo.algorithms.moo.nsga2")
    mutation: Any = import_module("pymoo.core.mutation")
    problem: Any = import_module("pymoo.core.problem")
    crossover: Any = import_module("pymoo.operators.crossover.ux")
    optimize: Any = import_module("pymoo.optimize")
    coding = _Coding(models, slot_budgets)

    class Problem(problem.ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(
                n_var=len(coding.upper), n_obj=2, n_ieq_constr=1, xl=0, xu=coding.upper, vtype=int
            )

        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"], out["G"] = coding.costs(x)

    class Redrawn(mutation.Mutation):
        def _do(self, _: Any, x_NV: np.ndarray, *, random_state: Any, **__: Any) -> np.ndarray:
            return coding.redrawn(x_NV, random_state)

    operators: dict[str, Any] = {  # pymoo's annotations name its defaults' classes only
        "sampling": coding.population(front),
        "crossover": crossover.UniformCrossover(),
        "mutation": Redrawn(),
    }
    algorithm = nsga2.NSGA2(pop_size=_POPULATION, eliminate_duplicates=True, **operators)
    result = optimize.minimize(Problem(), algorithm, ("n_gen", _GENERATIONS), seed=0, verbose=False)
    if result.X is None:
        return []
    return [coding.point(x) for x in np.atleast_2d(result.X)]


class _Coding:
    """Genes: an option's number for each block, the policy's, the rest's."""

    def __init__(self, models: Models, slot_budgets: Mapping[str, int]):
        self._models, self._rooms = models, slot_budgets
        self._rests = list(slot_budgets)
        self._names = list(models.fields[0].options)
        self._bytes = {
            name: np.array([one.nbytes for one in models.fields[0].options[name]])
            for name in self._names
        }
        sizes = [len(self._bytes[name]) for name in self._names]
        self.upper = np.array([*sizes, len(models.fields), len(self._rests)]) - 1

    def costs(self, x: np.ndarray) -> tuple[list[float], list[float]]:
        """Loss and seconds, and bytes beyond the room as a share of it."""
        room = self._rooms[self._rests[x[-1]]]
        nbytes = self._taken(x)
        if nbytes > room:
            return [1e3, 1e3], [nbytes / max(room, 1) - 1]
        point = self.point(x)
        return [point.loss, point.seconds], [-1.0]

    def point(self, x: np.ndarray) -> Point:
        field = self._models.fields[x[-2]]
        chosen = {
            name: field.options[name][gene] for name, gene in zip(self._names, x[:-2], strict=True)
        }
        configuration = field.configuration(chosen, self._rests[x[-1]])
        return self._models.judged(configuration, self._taken(x), "genetic search")

    def _taken(self, x: np.ndarray) -> int:
        return int(sum(self._bytes[n][g] for n, g in zip(self._names, x[:-2], strict=True)))

    def population(self, front: Sequence[Point]) -> np.ndarray:
        """The front's genes, and copies of them with some genes changed."""
        generator = np.random.default_rng(0)
        known = np.array([self._genes(one) for one in front[:_POPULATION]])
        copies = known[generator.integers(len(known), size=_POPULATION - len(known))]
        return np.concatenate([known, self.redrawn(copies, generator)])

    def redrawn(self, x_NV: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One or two genes of each, in the mean, drawn anew."""
        change_NV = generator.random(x_NV.shape) < 1.5 / len(self.upper)
        return np.where(change_NV, generator.integers(0, self.upper + 1, size=x_NV.shape), x_NV)

    def _genes(self, point: Point) -> list[int]:
        configuration = point.configuration
        number = next(
            n
            for n, field in enumerate(self._models.fields)
            if (field.policy.mode, field.policy.bound, field.policy.every)
            == (configuration.mode, configuration.bound, configuration.every)
        )
        options = self._models.fields[number].options
        genes = [
            next(
                n
                for n, option in enumerate(options[name])
                if option.placement == configuration.placement[name]
            )
            for name in self._names
        ]
        return [*genes, number, self._rests.index(configuration.rest)]
