"""Reference for `ScoringRule`: a family's routing rule, one token at a time in Python floats."""

import math

from torch import Tensor

from moefit.moe.scoring import Groups, ScoringRule

NUM_EXPERTS = 8
RULES = {
    "softmax": ScoringRule(score="softmax", chosen="kept"),
    "softmax-normalised": ScoringRule(score="softmax", chosen="normalised"),
    "softmax-of-chosen": ScoringRule(score="given", chosen="softmax"),
    "sigmoid-biased": ScoringRule(score="sigmoid", chosen="normalised", biased=True, scale=2.5),
    "sigmoid-groups": ScoringRule(
        score="sigmoid",
        chosen="normalised",
        biased=True,
        groups=Groups(number=4, kept=2, score="top_2"),
    ),
    "softmax-groups": ScoringRule(
        score="softmax", chosen="kept", scale=16.0, groups=Groups(number=2, kept=1, score="max")
    ),
    "sqrt-softplus": ScoringRule(score="sqrt_softplus", chosen="normalised", biased=True),
    "softmax-by-logits": ScoringRule(
        score="softmax", chosen="normalised", biased=True, by_logits=True
    ),
}
Weights = dict[int, float]


class Slow:
    """A rule, one token at a time, in Python floats."""

    def __init__(self, rule: ScoringRule, logits_E: Tensor, bias_E: Tensor | None):
        self.rule, self.logits = rule, [float(value) for value in logits_E]
        self.bias = [0.0] * NUM_EXPERTS if bias_E is None else [float(b) for b in bias_E]

    def scores(self) -> list[float]:
        match self.rule.score:
            case "softmax":
                top = max(self.logits)
                total = sum(math.exp(v - top) for v in self.logits)
                return [math.exp(v - top) / total for v in self.logits]
            case "sigmoid":
                return [1 / (1 + math.exp(-v)) for v in self.logits]
            case "sqrt_softplus":
                return [math.sqrt(math.log1p(math.exp(v))) for v in self.logits]
            case "given":
                return self.logits

    def preference(self) -> list[float]:
        scores = self.logits if self.rule.by_logits else self.scores()
        values = [s + b * self.rule.biased for s, b in zip(scores, self.bias, strict=True)]
        if self.rule.groups is None:
            return values
        size = NUM_EXPERTS // self.rule.groups.number
        groups = [values[i : i + size] for i in range(0, NUM_EXPERTS, size)]
        most = 1 if self.rule.groups.score == "max" else 2
        totals = [sum(sorted(group)[-most:]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -totals[g])[: self.rule.groups.kept]
        return [v if e // size in kept else -math.inf for e, v in enumerate(values)]

    def best(self, count: int, among: set[int], values: list[float]) -> list[int]:
        real = [expert for expert in among if values[expert] > -math.inf]
        return sorted(real, key=lambda e: -values[e])[:count]

    def weights(self, ids: list[int]) -> Weights:
        values = self.logits if self.rule.chosen == "softmax" else self.scores()
        weights = {e: values[e] for e in ids}
        if self.rule.chosen == "softmax":
            weights = {e: math.exp(value) for e, value in weights.items()}
        if self.rule.chosen != "kept":
            total = sum(weights.values())
            weights = {e: value / total for e, value in weights.items()}
        factor_E = self.rule.factor_E
        factors = {e: 1.0 if factor_E is None else float(factor_E[e]) for e in ids}
        return {e: value * self.rule.scale * factors[e] for e, value in weights.items()}
