"""What a text asks of every block: routes, recorded while the model runs exactly.

Owns the hooks that listen. Takes a served model and token windows; gives numbers without tensors.

Shapes: B windows, T tokens, E experts, K chosen per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moefit.plan.replay import Step
from moefit.serve.served import ServedModel
from moefit.serve.virtual_experts import VirtualExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """One block's steps, and each expert's share of router weight and of what is added to x.

    mass_E and loudness_E sum to one; experts: how many a token uses, in the mean.
    rule_known: whether the router's rule was recognised.
    """

    steps: Sequence[Step]
    mass_E: Sequence[float]
    loudness_E: Sequence[float]
    experts: float
    rule_known: bool = True


@torch.inference_mode()
def record_routes(served: ServedModel, windows_BT: Tensor) -> dict[str, Routes]:
    """Routes of all windows by block, one window after the other; the mode must be exact."""
    steps: dict[str, list[Step]] = {name: [] for name in served.blocks}
    for experts in served.blocks.values():
        experts.listen()
    with _listening(served, steps):
        for window_T in windows_BT:
            ids_1T = window_T[None].to(served.model.device)
            served.model(input_ids=ids_1T, use_cache=False)
    return {name: _routes(steps[name], served.blocks[name]) for name in steps}


@contextmanager
def _listening(served: ServedModel, steps: dict[str, list[Step]]) -> Iterator[None]:
    hooks: list[RemovableHandle] = []
    for name, experts in served.blocks.items():

        def hear(module: VirtualExperts, args: tuple[Tensor, ...], name: str = name) -> None:
            steps[name] += _steps(module, *args)

        hooks.append(experts.register_forward_pre_hook(hear))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _steps(experts: VirtualExperts, x: Tensor, *arguments: Tensor) -> Iterator[Step]:
    x_TD = x.reshape(-1, x.shape[-1])
    routing = experts.block.layout.routing(len(x_TD), *arguments)
    ids, weights = routing.ids_TK.tolist(), routing.weights_TK.float().abs().tolist()
    norms = x_TD.float().norm(dim=-1).tolist()
    scores = _scores(experts, len(x_TD))
    for chosen, heavy, norm, score in zip(ids, weights, norms, scores, strict=True):
        pairs = [(e, w) for e, w in zip(chosen, heavy, strict=True) if e < experts.num_experts]
        yield Step(
            chosen=[e for e, _ in pairs], weights=[w for _, w in pairs], scores=score, norm=norm
        )


def _scores(experts: VirtualExperts, tokens: int) -> list[list[float]]:
    """By which substitutes are chosen; zeros where the router's rule is not known."""
    if experts.scoring is None or experts.logits_TE is None:
        return [[0.0] * experts.num_experts] * tokens
    logits_TE = experts.logits_TE.reshape(-1, experts.num_experts)
    return experts.scoring.preference(logits_TE, experts.bias_E).float().tolist()


def _routes(steps: Sequence[Step], experts: VirtualExperts) -> Routes:
    mass = [0.0] * experts.num_experts
    for step in steps:
        total = sum(step.weights) or 1.0
        for expert, weight in zip(step.chosen, step.weights, strict=True):
            mass[expert] += weight / total
    return Routes(
        steps=steps,
        mass_E=_shares(mass),
        loudness_E=_shares(experts.loudness.scores()),
        experts=sum(len(step.chosen) for step in steps) / max(1, len(steps)),
        rule_known=experts.scoring is not None or not experts.used,
    )


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 1 / len(values) for value in values]
