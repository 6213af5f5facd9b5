"""Train mixture-of-experts language models, and serve them inside a memory budget."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `moefit.load` when it is first used, so that importing moefit is fast."""
    if name == "load":
        return import_module("moefit.api").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
