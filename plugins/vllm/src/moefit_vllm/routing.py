"""Inference rules of DS-MoE: which experts a token uses, with which weights.

Shapes: T tokens, E experts, K slots of a token.
"""

from dataclasses import dataclass

import torch


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
            ValueError: vLLM cannot serve by it.
        """
        kind, *values = text.split(":")
        renormalize = values[-1:] == ["renormalize"]
        if kind not in ("dense", "top_k", "threshold"):
            raise ValueError(
                f"inference_rule {text!r}: its number of experts depends on which requests share a "
                "step, which vLLM changes all the time; use dense, top_k:K or threshold:EPS"
            )
        return cls(kind, 0.0 if kind == "dense" else float(values[0]), renormalize)

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
