"""Answer the question of what to train: the model, why, its alternatives, and how sure it is.

`advise` chooses by one of the two algorithms of `search` and adds what over-training costs and
saves, what other laws would choose within the same limits, and how far the choice lies outside the
runs that the law was fitted to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from moefit.advise.laws import Law, leverage_law, published_laws
from moefit.advise.search import (
    Candidate,
    Question,
    best_quality,
    candidates,
    least_cost,
    pareto_front,
)
from moefit.advise.serving import QUANTISATION_NATS, memory_cost, served_sizes
from moefit.advise.shapes import Shape, short_count
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.memory.budget import format_bytes

_HALVINGS = 60


class Algorithm(StrEnum):
    """The two algorithms of Yun et al. (arXiv 2404.02852)."""

    best_quality = "best-quality"
    least_cost = "least-cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverTraining:
    """A smaller model trained on more tokens, against the loss-optimal one of the same budget.

    Attributes:
        optimal: The loss-optimal shape with the same experts.
        optimal_tokens: Its training tokens.
        loss: Nats that the chosen model loses against it.
        compute_share: Part of the budget with which a loss-optimal model has the chosen one's loss.
        resident: Bytes of the optimal model in the chosen precision.
        speed: Its tokens per second for one sequence, if its memory were there.
    """

    optimal: Shape
    optimal_tokens: float
    loss: float
    compute_share: float
    resident: int
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What another law says.

    Attributes:
        law: Its name.
        choice: What it would choose within the same limits; None if it says nothing.
        tokens: On how many tokens.
        regret: Nats that the recommendation loses against `choice` by this law; None if the law
            does not apply to it.
        reason: Why `choice` or `regret` is None, or what `regret` does not consider.
    """

    law: str
    choice: Shape | None
    tokens: float
    regret: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer.

    Attributes:
        question: What was to be trained and served.
        algorithm: By which the model was chosen.
        target: The loss to reach; None for the best.
        chosen: The recommended model.
        limited_by: Why it is no larger.
        by_experts: The best model for each number of experts.
        everything: All models that fit and are fast enough.
        front: Loss against serving cost, cheapest first.
        over_training: Against the loss-optimal model; None for a law without tokens.
        opinions: Of other laws.
        leverage: How many times less compute it needs than a dense model, by another law.
        warnings: Quantities outside the law's range, and other limits of the answer.
    """

    question: Question
    algorithm: Algorithm
    target: float | None
    chosen: Candidate
    limited_by: str
    by_experts: tuple[Candidate, ...]
    everything: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    over_training: OverTraining | None
    opinions: tuple[Opinion, ...]
    leverage: float
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        question, over = self.question, self.over_training
        law = question.law
        return {
            "law": {
                "name": law.name,
                "source": law.source,
                "counts": law.counts.value,
                "tokens": law.tokens,
                "error": law.error,
                "ranking_only": law.ranking_only,
            },
            "training_flops": question.flops,
            "hardware": {"name": question.device.name, "basis": question.device.basis},
            "algorithm": self.algorithm.value,
            "target_loss": self.target,
            "recommended": self.chosen.as_dict(),
            "limited_by": self.limited_by,
            "by_experts": [one.as_dict() for one in self.by_experts],
            "front": [one.as_dict() for one in self.front],
            "over_training": over
            and {
                "optimal_active_parameters": over.optimal.active,
                "optimal_total_parameters": over.optimal.total,
                "optimal_tokens": over.optimal_tokens,
                "loss": over.loss,
                "compute_share": over.compute_share,
                "optimal_resident_bytes": over.resident,
                "optimal_tokens_per_second": over.speed,
            },
            "opinions": [
                {
                    "law": one.law,
                    "active_parameters": one.choice and one.choice.active,
                    "experts": one.choice and one.choice.num_experts,
                    "granularity": one.choice and one.choice.granularity,
                    "tokens": one.tokens,
                    "regret": one.regret,
                    "reason": one.reason,
                }
                for one in self.opinions
            ],
            "efficiency_leverage": self.leverage,
            "warnings": list(self.warnings),
        }


def advise(
    question: Question,
    algorithm: Algorithm = Algorithm.best_quality,
    *,
    max_loss: float | None = None,
    match_experts: int = 1,
) -> Advice:
    """Return what to train.

    Args:
        question: Budget, law and limits.
        algorithm: best-quality under the caps, or least-cost at equal quality.
        max_loss: For least-cost, the loss to reach; by default that of the loss-optimal model with
            `match_experts` experts at the same budget.
        match_experts: See `max_loss`.

    Raises:
        BudgetTooSmallError: No model fits in the memory.
        ConfigError: The budget, the limits or the loss leave no model, or the law refuses all.
    """
    target = None
    if algorithm is Algorithm.least_cost:
        target = max_loss if max_loss is not None else _matched(question, match_experts)
        chosen = least_cost(question, target)
    else:
        chosen = best_quality(question)
    everything = tuple(candidates(question))
    leverage, outside = leverage_law().of(chosen.shape, question.flops)
    warnings = question.law.warnings(chosen.shape, chosen.tokens)
    if chosen.shape.experts > 1 and outside:
        warnings.append(f"efficiency leverage is extrapolated: {', '.join(outside)}")
    if question.law.ranking_only:
        warnings.append(f"losses of {question.law.name} only rank models: {question.law.error}")
    return Advice(
        question=question,
        algorithm=algorithm,
        target=target,
        chosen=chosen,
        limited_by=_limit(question, chosen, target),
        by_experts=_by_experts(everything),
        everything=everything,
        front=tuple(pareto_front(everything)),
        over_training=_over_training(question, chosen),
        opinions=tuple(_opinions(question, chosen)),
        leverage=leverage if chosen.shape.experts > 1 else 1.0,
        warnings=tuple(warnings),
    )


def _matched(question: Question, experts: int) -> float:
    key = next((key for key in question.families if key[0] == experts), None)
    if key is None:
        known = ", ".join(str(one) for one in sorted({e for e, _ in question.families}))
        raise ConfigError(
            f"--match-experts {experts}: {question.law.name} has no loss for that many at this "
            f"budget; it has for {known}"
        )
    return question.loss(question.optimal(key))


def _by_experts(everything: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    best: dict[int, Candidate] = {}
    for one in everything:
        held = best.get(one.shape.experts)
        if held is None or (one.loss, one.cost) < (held.loss, held.cost):
            best[one.shape.experts] = one
    return tuple(best[experts] for experts in sorted(best))


def _limit(question: Question, chosen: Candidate, target: float | None) -> str:
    """Return why the next larger shape of the family was not chosen."""
    key = chosen.shape.experts, chosen.shape.granularity
    if target is not None:
        return f"it is the smallest with a loss of at most {target:.4f} nats"
    shapes = question.families[key]
    following = shapes.index(chosen.shape) + 1
    if chosen.shape == question.optimal(key):
        return "a larger one would see too few tokens: it is the loss-optimal size of the budget"
    larger = question.fitting(shapes[following], chosen.precision)
    if larger is None:
        least = question.least_memory(shapes[following], chosen.precision)
        devices = 1 if question.traffic is None else question.traffic.devices
        each = "" if devices == 1 else f" on each of {devices} devices"
        return f"the memory: the next larger one takes {format_bytes(least)}{each}"
    speed = question.limits.min_speed
    if speed is not None and larger.speed < speed:
        return f"the speed: the next larger one decodes {larger.speed:.3g} tokens/s"
    assert larger.traffic is not None
    return f"the traffic: the next larger one serves {larger.traffic.capacity:.3g} tokens/s"


def _over_training(question: Question, chosen: Candidate) -> OverTraining | None:
    if question.law.fixed_tokens is not None:
        return None
    key = chosen.shape.experts, chosen.shape.granularity
    optimal = question.optimal(key)
    sizes = served_sizes(
        optimal,
        chosen.precision,
        context=question.limits.context,
        is_gpu=question.device.is_gpu,
    )
    unlimited = replace(question.limits, memory=float(1 << 60))
    cost = memory_cost(sizes, question.device, unlimited)
    assert cost is not None
    return OverTraining(
        optimal=optimal,
        optimal_tokens=question.tokens(optimal),
        loss=chosen.law_loss - question.loss(optimal),
        compute_share=_share_of_budget(question, key, chosen.law_loss),
        resident=sizes.resident,
        speed=1 / cost.seconds,
    )


def _share_of_budget(question: Question, key: tuple[int, int], loss: float) -> float:
    """Return the part of the budget at which the loss-optimal model of a family has a loss."""

    def reached(share: float) -> bool:
        smaller = replace(question, flops=share * question.flops)
        return min(map(smaller.loss, question.families[key])) <= loss

    return _least(reached, 1e-6, 1.0)


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the least value for which an increasing condition holds, by bisection in logarithms.

    >>> round(_least(lambda x: x >= 0.3, 1e-3, 1.0), 6)
    0.3
    """
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _opinions(question: Question, chosen: Candidate) -> list[Opinion]:
    laws = [one for one in published_laws().values() if one.name != question.law.name]
    return [_opinion(replace(question, law=law), chosen) for law in laws]


def _opinion(question: Question, chosen: Candidate) -> Opinion:
    law = question.law
    try:
        choice = best_quality(question)
    except (ConfigError, BudgetTooSmallError) as error:
        return Opinion(
            law=law.name, choice=None, tokens=0.0, regret=None, reason=_brief(law, question, error)
        )
    regret, reason = _regret(question, chosen, choice)
    judged = [choice] if regret is None else [choice, chosen]
    return Opinion(
        law=law.name,
        choice=choice.shape,
        tokens=choice.tokens,
        regret=regret,
        reason="; ".join(filter(None, [reason, _outside(law, judged)])),
    )


_WORTH_SAYING = 1.1  # times outside of a law's runs


def _outside(law: Law, judged: Sequence[Candidate]) -> str:
    """Return how far a law is extrapolated for these models, if it is."""
    found = [law.distances(one.shape, one.tokens).values() for one in judged]
    factor = max([factor for one in found for _, factor in one], default=1.0)
    return f"up to {factor:.2g} times outside its runs" if factor >= _WORTH_SAYING else ""


def _brief(law: Law, question: Question, error: Exception) -> str:
    if law.fixed_tokens is not None and not isinstance(error, BudgetTooSmallError):
        return (
            f"its {short_count(law.fixed_tokens)} tokens cost more than {question.flops:.3g} FLOPs "
            "for every model of its range, or serve too slowly"
        )
    return "says nothing at this budget and within these limits"


def _regret(question: Question, chosen: Candidate, choice: Candidate) -> tuple[float | None, str]:
    """Return the nats that `chosen` loses against `choice` by a law, or None, and a note."""
    law, shape = question.law, chosen.shape
    if law.ranking_only:
        return None, "only ranks models"
    if shape.experts not in law.experts or shape.granularity not in law.granularities:
        return None, f"has no term for {shape.experts} experts of granularity {shape.granularity}"
    loss = question.loss(shape)
    if math.isinf(loss):
        return None, "does not apply to that size or number of tokens"
    note = ""
    if law.fixed_tokens is not None:
        note = f"ignores tokens: both as if trained on {short_count(law.fixed_tokens)}"
    return loss + QUANTISATION_NATS[chosen.precision] - choice.loss, note
