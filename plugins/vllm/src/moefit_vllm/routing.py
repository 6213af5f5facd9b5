"""Inference rules of DS-MoE: which experts a token uses, with which weights.

Shapes: T tokens, E experts, K slots of a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


def _positive(text: str, number: type[int] | type[float]) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return float(value)


_VALUES: dict[str, Callable[..., float]] = {
    "dense": lambda: 0.0,
    "top_k": lambda k: _positive(k, int),
    "threshold": lambda epsilon: _positive(epsilon, float),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """`dense`, `top_k:K` or `threshold:EPS`, each with `:renormalize` or without."""

    kind: str
    value: float
    renormalize: bool

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Parse a rule.

        Raises:
            ValueError: It is no rule, or vLLM cannot serve by it.
        """
        kind, *values = text.split(":")
        renormalize = values[-1:] == ["renormalize"]
        values = values[: len(values) - renormalize]
        if kind == "threshold_top_k":
            raise ValueError(
                f"inference_rule {text!r}: its number of experts depends on which requests share a "
                "step, which vLLM changes all the time; use dense, top_k:K or threshold:EPS"
            )
        try:
            value = _VALUES[kind](*values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"inference_rule {text!r} is none; use dense, top_k:K or threshold:EPS with K and "
                "EPS above zero, such as top_k:4"
            ) from error
        return cls(kind, value, renormalize)

    def slots(self, num_experts: int) -> int:
        """Return K of the fused kernels: a threshold may use all experts."""
        return int(self.value) if self.kind == "top_k" else num_experts

    def route(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights [T, K], 0 for experts that a token does not use, and ids [T, K]."""
        weights_TK, ids_TK = scores_TE.topk(self.slots(scores_TE.shape[-1]), dim=-1)
        if self.kind == "threshold":
            used_TK = weights_TK * scores_TE.shape[-1] > self.value
            used_TK[:, 0] = True  # the best expert, always
            weights_TK = weights_TK * used_TK
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, ids_TK

    def gates(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Return the weights of attention experts [T, E]: only a threshold leaves any out."""
        if self.kind != "threshold":
            return scores_TE
        weights_TK, ids_TK = self.route(scores_TE)
        return torch.zeros_like(scores_TE).scatter(-1, ids_TK, weights_TK)
