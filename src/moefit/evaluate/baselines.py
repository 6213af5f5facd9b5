"""Resident sets that do not change: what virtual experts are compared with.

Owns the choice of a fixed set per block: by expert norm (the paper's "Pruning"), by how often or
with how much weight a calibration text used an expert, or at random. Everything resident and
on-demand with LRU need no choice: they are budgets and policies of the exact mode.
"""

import random
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from moefit.errors import ConfigError
from moefit.serve.served import ServedModel

Baseline = Literal["norm", "frequency", "importance", "random"]


def fix_residents(
    served: ServedModel, kind: Baseline, *, calibration_ids_T: Tensor | None = None, seed: int = 0
) -> Mapping[str, list[int]]:
    """Choose and load a fixed set that fills the slots; the mode is virtual and nothing changes.

    calibration_ids_T: tokens for `frequency` and `importance`, run exactly, once.
    Raises ConfigError for another kind, or without calibration tokens where they are needed.
    """
    if kind not in get_args(Baseline):
        raise ConfigError(f"baseline {kind!r} is not one of {', '.join(get_args(Baseline))}")
    if kind in ("frequency", "importance"):
        if calibration_ids_T is None:
            raise ConfigError(f"baseline {kind} counts on a text; give some to calibrate on")
        served.set_mode("exact", residency="manager")
        served.reset()
        served.model(input_ids=calibration_ids_T[None].to(served.model.device), use_cache=False)
    order = _orders(served, kind, seed)
    chosen = {
        name: sorted(order[name][: experts.residency.number])
        for name, experts in served.blocks.items()
    }
    served.set_residents(chosen)
    served.set_mode("virtual", residency="fixed")
    return chosen


def _orders(served: ServedModel, kind: Baseline, seed: int) -> dict[str, list[int]]:
    """Each block's experts, the one to keep longest first."""
    if kind == "random":
        generator = random.Random(seed)
        return {
            name: generator.sample(range(one.num_experts), one.num_experts)
            for name, one in served.blocks.items()
        }
    scores = {
        name: served.norms(name)
        if kind == "norm"
        else one.uses[: one.num_experts]
        if kind == "frequency"
        else one.importance.scores()
        for name, one in served.blocks.items()
    }
    return {
        name: sorted(range(len(values)), key=lambda e, values=values: (-values[e], e))
        for name, values in scores.items()
    }
