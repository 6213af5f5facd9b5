"""Formulas of scaling laws: the loss as a function of parameters, tokens and experts.

A `Form` has a formula and the names of its coefficients, but no values: published values are in
`data/laws.yaml`, fitted ones come from `fitting`. Formulas return the natural logarithm of the loss
and accept complex coefficients, so that derivatives are exact (complex step).

Shapes: P points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Coefficients = Mapping[str, Any]
"""Values by name; complex where derivatives are taken."""
_LN10 = float(np.log(10.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Models whose loss is computed. Fields are floats, or arrays of the same shape.

    Attributes:
        parameters: N, as the law counts parameters.
        tokens: D, training tokens.
        experts: E, in units of a whole MLP: a layer has `experts * granularity` small ones.
        granularity: G, how many experts a whole MLP is divided into; also how many are active.
    """

    parameters: Any
    tokens: Any
    experts: Any = 1.0
    granularity: Any = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One formula.

    Attributes:
        name: As given to `moefit law fit --form`.
        formula: As text.
        coefficients: Names, in the order in which they are fitted.
        logged: Coefficients that are positive, which are fitted as logarithms.
        starts: Values from which fits start, as they are fitted; empty if it cannot be fitted.
        varying: Fields of `Points` that must vary among the runs of a fit, and how many different
            values determine the coefficients: three where a power law is added to a constant.
        log_loss: Returns ln L of points.
    """

    name: str
    formula: str
    coefficients: tuple[str, ...]
    logged: frozenset[str]
    starts: Mapping[str, tuple[float, ...]]
    varying: Mapping[str, int]
    log_loss: Callable[[Coefficients, Points], Any]

    def loss(self, coefficients: Coefficients, points: Points) -> Any:
        """Return L in nats per token."""
        return np.exp(self.log_loss(coefficients, points))


def saturating_experts(experts: Any, start: Any, most: Any) -> Any:
    """Return the saturating number of experts of Clark et al. (arXiv 2202.01169, equation 6).

    1/result = 1/(E - 1 + (1/start - 1/most)^-1) + 1/most: it is `start` at E = 1 and tends to
    `most`.

    >>> round(saturating_experts(1, 2.0, 300.0), 9)
    2.0
    """
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def _log_sum(*terms: Any) -> Any:
    """Return the logarithm of a sum of exponentials, without overflow."""
    stacked = np.stack(np.broadcast_arrays(*terms))
    highest = np.real(stacked).max(axis=0)
    return highest + np.log(np.exp(stacked - highest).sum(axis=0))


def _clark(c: Coefficients, at: Points) -> Any:
    n = np.log10(at.parameters)
    e = np.log(saturating_experts(at.experts, c["start"], c["most"])) / _LN10
    return _LN10 * (c["a"] * n + c["b"] * e + c["c"] * n * e + c["d"])


def _joint(c: Coefficients, at: Points) -> Any:
    n, d = np.log(at.parameters), np.log(at.tokens)
    e = np.log(saturating_experts(at.experts, c["start"], c["most"]))
    return _log_sum(
        np.log(c["a"]) + c["delta"] * e + (c["alpha"] + c["gamma"] * e) * n,
        np.log(c["b"]) + c["omega"] * e + (c["beta"] + c["zeta"] * e) * d,
        np.log(c["c"]),
    )


def _yun(c: Coefficients, at: Points) -> Any:
    n, d = np.log(at.parameters), np.log(at.tokens)
    e = np.log(saturating_experts(at.experts, c["start"], c["most"]))
    return c["d"] * n * e + _log_sum(
        np.log(c["a"]) - c["alpha"] * n,
        np.log(c["b"]) - c["beta"] * e,
        np.log(c["c"]) - c["gamma"] * d,
        np.log(c["f"]),
    )


def _chinchilla(c: Coefficients, at: Points) -> Any:
    return _log_sum(
        np.log(c["e"]),
        np.log(c["a"]) - c["alpha"] * np.log(at.parameters),
        np.log(c["b"]) - c["beta"] * np.log(at.tokens),
    )


def _fine_grained(c: Coefficients, at: Points) -> Any:
    per_size = c["g"] * np.power(at.granularity, -c["gamma"]) + c["a"]
    return np.log(
        c["c"]
        + per_size * np.power(at.parameters, -c["alpha"])
        + c["b"] * np.power(at.tokens, -c["beta"])
    )


def _sparsity(c: Coefficients, at: Points) -> Any:
    active = 1.0 / np.asarray(at.experts)  # 1 - S
    n, d = at.parameters, at.tokens
    return np.log(
        c["a"] * np.power(n, -c["alpha"])
        + c["b"] * np.power(d, -c["beta"])
        + c["c"] * np.power(active, -c["lambda"])
        + c["d"] * np.power(active, -c["delta"]) * np.power(n, -c["gamma"])
        + c["e"]
    )


_LOG_SIZES = (0.0, 2.5, 5.0, 7.5)
_EXPONENTS = (0.1, 0.3, 0.6)
_SATURATION = {"start": (np.log(2.0),), "most": (np.log(300.0),)}

CLARK = Form(
    name="clark",
    formula="log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d",
    coefficients=("a", "b", "c", "d", "start", "most"),
    logged=frozenset({"start", "most"}),
    starts={
        "a": (-0.2, -0.1, -0.05),
        "b": (-0.2, -0.1, 0.0),
        "c": (0.0, 0.01),
        "d": (0.5, 1.0, 1.5),
        "start": (np.log(1.5), np.log(3.0)),
        "most": (np.log(100.0), np.log(500.0)),
    },
    varying={"parameters": 2, "experts": 3},
    log_loss=_clark,
)
JOINT = Form(
    name="joint",
    formula="L = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c",
    coefficients=(
        *("a", "alpha", "delta", "gamma", "b", "beta", "omega", "zeta", "start", "most", "c"),
    ),
    logged=frozenset({"a", "b", "c", "start", "most"}),
    starts={
        "a": (2.5, 4.5, 6.5),
        "alpha": (-0.4, -0.2),
        "delta": (-0.2, 0.0),
        "gamma": (0.0, 0.01),
        "b": (2.5, 4.5, 6.5),
        "beta": (-0.4, -0.2),
        "omega": (0.0, 0.5),
        "zeta": (-0.02, 0.0),
        "c": (0.0, 0.4),
        **_SATURATION,
    },
    varying={"parameters": 3, "tokens": 3, "experts": 3},
    log_loss=_joint,
)
YUN = Form(
    name="yun",
    formula="ln L = ln(A/N^α + B/Ê^β + C/D^γ + F) + d ln N ln Ê",
    coefficients=("a", "alpha", "b", "beta", "c", "gamma", "f", "d", "start", "most"),
    logged=frozenset({"a", "b", "c", "f", "start", "most"}),
    starts={
        "a": _LOG_SIZES[1:],
        "alpha": _EXPONENTS,
        "b": (-2.0, 0.0),
        "beta": _EXPONENTS,
        "c": _LOG_SIZES[1:],
        "gamma": _EXPONENTS,
        "f": (-0.5, 0.5),
        "d": (0.0,),
        **_SATURATION,
    },
    varying={"parameters": 3, "tokens": 3, "experts": 3},
    log_loss=_yun,
)
CHINCHILLA = Form(
    name="chinchilla",
    formula="L = E + A/N^α + B/D^β",
    coefficients=("a", "alpha", "b", "beta", "e"),
    logged=frozenset({"a", "b", "e"}),
    starts={
        "a": (*_LOG_SIZES, 10.0, 15.0),
        "alpha": (*_EXPONENTS, 1.0),
        "b": (*_LOG_SIZES, 10.0, 15.0),
        "beta": (*_EXPONENTS, 1.0),
        "e": (-1.0, 0.0, 0.5, 1.0),
    },
    varying={"parameters": 3, "tokens": 3},
    log_loss=_chinchilla,
)
FINE_GRAINED = Form(
    name="fine-grained",
    formula="L = c + (g/G^γ + a)/N^α + b/D^β",
    coefficients=("a", "alpha", "b", "beta", "g", "gamma", "c"),
    logged=frozenset({"a", "b", "g", "c"}),
    starts={},
    varying={"parameters": 3, "tokens": 3},
    log_loss=_fine_grained,
)
SPARSITY = Form(
    name="sparsity",
    formula="L = a/N^α + b/D^β + c/(1-S)^λ + d/((1-S)^δ N^γ) + e",
    coefficients=("a", "alpha", "b", "beta", "c", "lambda", "d", "delta", "gamma", "e"),
    logged=frozenset(),
    starts={},
    varying={"parameters": 3, "tokens": 3},
    log_loss=_sparsity,
)
FORMS: Mapping[str, Form] = {
    one.name: one for one in (CLARK, JOINT, YUN, CHINCHILLA, FINE_GRAINED, SPARSITY)
}
FITTED_FORMS = tuple(name for name, one in FORMS.items() if one.starts)
"""Names of the forms that can be fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficiencyLeverage:
    """How many times less compute an MoE needs than a dense model of the same loss.

    Tian et al. 2025 (arXiv 2507.17702), equation of the joint law: Â^(α + γ (log2 G)^2 +
    β log2 G), α = a + d log10 C. The paper does not print the bases of its logarithms; these
    reproduce its examples.
    """

    a: float
    d: float
    gamma: float
    beta: float
    start: float
    most: float

    def leverage(self, activation: float, granularity: float, flops: float) -> float:
        """Return the ratio of FLOPs.

        Args:
            activation: Active over all experts, shared ones included, 0 to 1.
            granularity: 2 * model width / expert width.
            flops: Training budget.
        """
        saturated = saturating_experts(activation + 1.0, self.start, self.most)
        fineness = np.log2(granularity)
        exponent = self.a + self.d * np.log10(flops)
        exponent += self.gamma * fineness**2 + self.beta * fineness
        return float(saturated**exponent)

    @property
    def best_granularity(self) -> float:
        """The granularity with the highest leverage."""
        return float(2 ** (-self.beta / (2 * self.gamma)))
