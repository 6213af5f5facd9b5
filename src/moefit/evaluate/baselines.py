"""Baselines of a served model: fixed resident sets, and the model at native precision."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch

from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.host import available_bytes
from moefit.serve.config import AUTO_PRECISION, NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.load import load_model
from moefit.serve.memory.held import held_bytes
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows


def native_reference(served: ServedModel, settings: LoadSettings) -> ServedModel | None:
    """Load the same model at native precision, with what the budget leaves.

    Args:
        served: The model to compare.
        settings: Settings that `served` was loaded with.

    Returns:
        The model in exact mode; None if both do not fit together.
    """
    device, budget = served.model.device, served.budget
    held = held_bytes(device)
    available = torch.cuda.mem_get_info(device)[0] if device.type != "cpu" else available_bytes()
    total = held + available if budget.total is None else budget.total
    used = total if settings.precision == AUTO_PRECISION else budget.total_for_slots(budget.slots())
    native = replace(
        settings,
        memory=held + total - used,
        mode="exact",
        precision=NATIVE_PRECISION,
        dense_precision=NATIVE_PRECISION,
        generation_config=IGNORE,
    )
    try:
        return load_model(served.folder, native)
    except BudgetTooSmallError:
        return None


Baseline = Literal["norm", "frequency", "importance", "random"]


@torch.inference_mode()
def fix_residents(
    served: ServedModel, kind: Baseline, *, calibration: Windows | None = None, seed: int = 0
) -> Mapping[str, list[int]]:
    """Load a fixed set of experts that fills the slots, and use it in virtual mode.

    Args:
        served: The model.
        kind: How experts are ranked: by the norm of their weights, by how often they are chosen,
            by SwapMoE's importance, or randomly.
        calibration: Tokens for `frequency` and `importance`, processed once in exact mode.
        seed: For `random`.

    Returns:
        The resident experts by block.

    Raises:
        ConfigError: The kind is unknown, or calibration tokens are missing.
    """
    if kind not in get_args(Baseline):
        raise ConfigError(f"baseline {kind!r} is not one of {', '.join(get_args(Baseline))}")
    if kind in ("frequency", "importance"):
        if calibration is None:
            raise ConfigError(f"baseline {kind} needs calibration, tokens to calibrate on")
        served.set_mode("exact", residency="manager")
        served.reset()
        for row in range(len(calibration)):
            served.model(**calibration.inputs(row, served.model.device), use_cache=False)
    order = _orders(served, kind, seed)
    chosen = {
        name: sorted(order[name][: experts.slot_table.num_slots])
        for name, experts in served.blocks.items()
    }
    served.set_mode("virtual", residency="fixed")  # may choose residents itself
    served.set_residents(chosen)
    return chosen


def _orders(served: ServedModel, kind: Baseline, seed: int) -> dict[str, list[int]]:
    """Return each block's experts in descending order of rank."""
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
