"""What a process holds now, and whether the system has room for a budget.

Asks the operating system, or torch for a GPU; knows a budget's totals, not what they consist of.
"""

import logging

import torch

from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.host import (
    available_bytes,
    peak_process_bytes,
    process_bytes,
    swap_bytes,
    tightest_limit,
    total_bytes,
)
from moefit.serve.memory.budget import MemoryBudget, at_least, format_bytes
from moefit.serve.memory.release import LIBRARY_PAGES, droppable_bytes

_LOG = logging.getLogger(__name__)


def held_bytes(device: torch.device) -> int:
    """Return the bytes that count against the budget now.

    On a CPU this is the resident set of the process, on a GPU the memory that torch has reserved,
    without the CUDA context.
    """
    return process_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)


def settled_bytes(device: torch.device) -> int:
    """Return `held_bytes` as they will be once unused pages of libraries have been dropped."""
    held = held_bytes(device)
    return held if device.type != "cpu" else held - droppable_bytes() + LIBRARY_PAGES


def unused_bytes(device: torch.device) -> int:
    """Return the bytes of unused pages of libraries, beyond what they take once dropped."""
    return 0 if device.type != "cpu" else max(0, droppable_bytes() - LIBRARY_PAGES)


def peak_held_bytes(device: torch.device) -> int:
    """Return the peak of `held_bytes` so far."""
    return peak_process_bytes() if device.type == "cpu" else torch.cuda.max_memory_reserved(device)


def check_system_memory(budget: MemoryBudget, device: torch.device) -> None:
    """Compare a budget with the memory that the system allows this process.

    A process that exceeds its control group's limit is killed without a message. So a budget that
    cannot fit is an error here, and one that may not fit is logged as a warning.

    Args:
        budget: The budget with its total.
        device: Of the model; budgets of a GPU are not checked.

    Raises:
        BudgetTooSmallError: The model's minimum budget exceeds the system's limit.
        ConfigError: The budget exceeds the system's limit, but a smaller one works.
    """
    if device.type != "cpu":
        return
    system_limit, limit = total_bytes(), tightest_limit()
    needed = budget.max_bytes if budget.total is None else min(budget.total, budget.max_bytes)
    free = available_bytes() + process_bytes()
    where = "this machine's memory"
    if limit is not None and limit.nbytes == system_limit:
        where = f"the limit of this process's control group ({limit.file})"
    exceeds = not swap_bytes() and needed - budget.first_use > system_limit
    if exceeds and budget.min_bytes - budget.first_use > system_limit:
        raise BudgetTooSmallError(
            f"{where} is {format_bytes(system_limit)}, but this model needs at least "
            f"{format_bytes(budget.min_bytes)}; raise it to {at_least(budget.min_bytes)}, or give "
            "a shorter context"
        )
    if exceeds:
        given = "without a budget" if budget.total is None else "in this budget"
        raise ConfigError(
            f"{given} the model would take {format_bytes(needed)}, but {where} is "
            f"{format_bytes(system_limit)}; give a budget (--memory) of "
            f"{max(budget.min_bytes, min(system_limit, free))} bytes or less, or raise the limit"
        )
    if needed <= free and budget.total is not None and budget.total > system_limit:
        _LOG.warning(
            "warning: the budget of %s is more than %s, %s; the model takes at most %s of it",
            *(format_bytes(budget.total), where, format_bytes(system_limit), format_bytes(needed)),
        )
    if needed > free:
        _LOG.warning(
            "warning: the model may take %s, but %s is %s, of which %s are free; if other "
            "processes need that memory, this one may be killed",
            *(format_bytes(needed), where, format_bytes(system_limit), format_bytes(free)),
        )
