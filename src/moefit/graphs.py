"""Keep functions that call kernels out of the graphs of `torch.compile`."""

from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.compile` leave a function as it is, for one that calls kernels.

    A graph ends where an address is passed to the library, and a tensor whose address has been
    taken but that is not used again is freed there, before the library reads it.
    """
    return cast(Callable[P, R], torch.compiler.disable(function))


def all_outside_of_graphs(owner: type[Owner]) -> type[Owner]:
    """Apply `outside_of_graphs` to all methods of a class."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, FunctionType) and name != "__init__":
            setattr(owner, name, outside_of_graphs(value))
    return owner
