"""How much each expert of a block matters now: SwapMoE's Expert Importance Estimator.

Owns one decayed score per expert. Pure. The score is SwapMoE's equation 1 without the expert's norm
|E_i|, which would have to be read from storage: the sum over tokens of |x| * |G(x)_i|, taken from
the router's unmasked choice so that absent experts are scored too. The paper has no decay; here
old tokens count less, by a half-life in tokens.
"""

from collections.abc import Mapping


class ExpertImportanceEstimator:
    """Scores of one block's experts.

    >>> estimator = ExpertImportanceEstimator(3, half_life_tokens=1)
    >>> estimator.observe({0: 4.0}); estimator.observe({2: 1.0})
    >>> estimator.scores()
    [2.0, 0.0, 1.0]
    """

    def __init__(self, num_experts: int, *, half_life_tokens: float = 24.0):
        assert half_life_tokens > 0
        self._decay = 0.5 ** (1 / half_life_tokens)
        self._scores = [0.0] * num_experts

    def observe(self, weights: Mapping[int, float], tokens: int = 1) -> None:
        """One step: per expert, the sum of |x| * weight over the step's tokens."""
        decay = self._decay**tokens
        scores = [score * decay for score in self._scores]
        for expert, weight in weights.items():
            scores[expert] += weight
        self._scores = scores

    def scores(self) -> list[float]:
        """The scores, expert by expert."""
        return list(self._scores)
