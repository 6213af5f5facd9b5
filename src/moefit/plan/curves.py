"""Misses and moved router weight of every block, as functions of its slots and the policy.

Owns making these curves by replay, and reading between their points.
"""

from collections.abc import Mapping
from typing import Any

from moefit.plan.experiments import policies, slot_counts
from moefit.plan.replay import Replayed, replay_bounded, replay_exact, replay_virtual
from moefit.plan.routes import Routes
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.policy import Mode, Policy

Curves = Mapping[str, Mapping[int, Replayed]]
"""By policy, then slots."""


def policy_key(mode: Mode, bound: float, every: int) -> str:
    """As `experiments.policies` names them."""
    return {"exact": "exact", "bounded": f"bounded:{bound:g}", "virtual": f"virtual:{every}"}[mode]


def make_curves(routes: Routes, num_experts: int, depth: float) -> dict[str, dict[str, Any]]:
    """All curves of one block, as plain values; depth is the block's among all, 0 to 1."""
    return {
        policy: {
            str(slots): _point(_replayed(policy, routes, num_experts, slots, depth))
            for slots in slot_counts(num_experts)
        }
        for policy in policies()
    }


def _point(one: Replayed) -> list[float]:
    return [one.misses, one.swaps, one.moved]


def _replayed(policy: str, routes: Routes, experts: int, slots: int, depth: float) -> Replayed:
    mode, _, value = policy.partition(":")
    if mode == "exact":
        return replay_exact(routes.steps, experts, slots)
    if mode == "bounded":
        bound = Policy(bound=float(value)).bound_at(depth)
        return replay_bounded(routes.steps, experts, slots, bound=bound)
    manager = VirtualExpertManager(every=int(value))
    return replay_virtual(routes.steps, experts, slots, manager)


def read_curves(values: Mapping[str, Any], num_experts: int) -> Curves:
    """From `make_curves`; with all experts resident nothing is missed or moved."""
    nothing = Replayed(misses=0.0, swaps=0.0, moved=0.0)
    return {
        policy: {
            **{
                int(slots): Replayed(misses=point[0], swaps=point[1], moved=point[2])
                for slots, point in sorted(points.items(), key=lambda one: int(one[0]))
            },
            num_experts: nothing,
        }
        for policy, points in values.items()
    }


def at(curves: Curves, policy: str, slots: int) -> Replayed:
    """Between two points of a curve in a straight line."""
    points = curves[policy]
    if slots in points:
        return points[slots]
    below = max(known for known in points if known < slots)
    above = min(known for known in points if known > slots)
    share = (slots - below) / (above - below)
    low, high = points[below], points[above]
    return Replayed(
        misses=low.misses + share * (high.misses - low.misses),
        swaps=low.swaps + share * (high.swaps - low.swaps),
        moved=low.moved + share * (high.moved - low.moved),
    )
