"""Baselines of a served model: fixed resident sets, and the model at native precision."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.host import available_bytes
from moefit.serve.config import AUTO_PRECISION, NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.load import load_model
from moefit.serve.memory.estimate import held_bytes
from moefit.serve.model import ServedModel


def native_reference(served: ServedModel, settings: LoadSettings) -> ServedModel | None:
    """The model that `served` would be in its own precision; None if both together have no room.

    settings: those that `served` was loaded with.
    """
    device, budget = served.model.device, served.budget
    held = held_bytes(device)
    total = held + _available_bytes(device) if budget.total is None else budget.total
    taken = (
        total if settings.precision == AUTO_PRECISION else budget.total_for_slots(budget.slots())
    )
    alike = replace(
        settings,
        memory=held + total - taken,
        mode="exact",
        precision=NATIVE_PRECISION,
        dense_precision=NATIVE_PRECISION,
        generation_config=IGNORE,
    )
    try:
        return load_model(served.folder, alike)
    except BudgetTooSmallError:
        return None


def _available_bytes(device: torch.device) -> int:
    """What the machine, or this process's control group, could still give."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


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
        name: sorted(order[name][: experts.slot_table.num_slots])
        for name, experts in served.blocks.items()
    }
    served.set_mode("virtual", residency="fixed")  # may choose residents itself
    served.set_residents(chosen)
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
        else one.use_counts[: one.num_experts]
        if kind == "frequency"
        else one.importance.scores()
        for name, one in served.blocks.items()
    }
    return {
        name: sorted(range(len(values)), key=lambda e, values=values: (-values[e], e))
        for name, values in scores.items()
    }
