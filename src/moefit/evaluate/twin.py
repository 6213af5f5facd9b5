"""The same model in its own precision, for an encoded one to be compared with.

Owns how much memory it may take: what is left beside the one that is there, of the budget, or
without a budget of the machine. Served exactly, so that it need not hold all of its experts.
"""

from dataclasses import replace

import torch

from moefit.errors import BudgetTooSmallError
from moefit.host import available_bytes
from moefit.serve.ledger import held_bytes
from moefit.serve.loading import load
from moefit.serve.served import ServedModel
from moefit.serve.settings import AUTO_PRECISION, NATIVE_PRECISION, LoadSettings


def native_twin(served: ServedModel, settings: LoadSettings) -> ServedModel | None:
    """The model that `served` would be in its own precision; None if both together have no room.

    settings: those that `served` was loaded with.
    """
    device, budget = served.model.device, served.budget
    held = held_bytes(device)
    total = held + _available_bytes(device) if budget.total is None else budget.total
    taken = total if settings.precision == AUTO_PRECISION else budget.with_slots(budget.slots())
    alike = replace(
        settings,
        memory=held + total - taken,
        mode="exact",
        precision=NATIVE_PRECISION,
        rest=NATIVE_PRECISION,
    )
    try:
        return load(served.folder, alike)
    except BudgetTooSmallError:
        return None


def _available_bytes(device: torch.device) -> int:
    """What the machine, or this process's control group, could still give."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()
