"""Mixture-of-experts language models in the memory people have."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`moefit.load`, found when it is asked for: importing moefit itself costs nothing."""
    if name == "load":
        return import_module("moefit.api").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
