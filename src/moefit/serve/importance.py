"""How much each expert of a block matters now: SwapMoE's Expert Importance Estimator.

Owns one decayed score per expert. Pure. The score is SwapMoE's equation 1, the sum over tokens of
|x| * |G(x)_i| * |E_i|, taken from the router's unmasked choice so that absent experts are scored
too. The paper has no decay; here old tokens count less, by a half-life in tokens.
"""

from collections.abc import Mapping, Sequence


class ExpertImportanceEstimator:
    """Scores of one block's experts.

    >>> estimator = ExpertImportanceEstimator(3, half_life_tokens=1)
    >>> estimator.observe({0: 4.0}); estimator.observe({2: 1.0})
    >>> estimator.scores()
    [2.0, 0.0, 1.0]
    """

    def __init__(
        self,
        num_experts: int,
        *,
        half_life_tokens: float = 24.0,
        norms: Sequence[float] | None = None,
    ):
        assert half_life_tokens > 0
        self._decay = 0.5 ** (1 / half_life_tokens)
        self._norms = list(norms) if norms is not None else [1.0] * num_experts
        self._scores = [0.0] * num_experts

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """One step: per expert, the sum of |x| * weight over the step's tokens."""
        decay = self._decay**tokens
        scores = [score * decay for score in self._scores]
        for expert, weight in weights.items():
            scores[expert] += weight * self._norms[expert]
        self._scores = scores

    def scores(self) -> list[float]:
        """The scores, expert by expert."""
        return list(self._scores)

    def best(self, count: int) -> list[int]:
        """The most important experts, best first; of equals the one with the lower id."""
        return sorted(range(len(self._scores)), key=lambda e: (-self._scores[e], e))[:count]
