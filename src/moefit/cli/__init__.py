"""The command line: parse, call, print."""

from moefit.cli import evaluating, models, packing, training
from moefit.cli.app import app, main

__all__ = ["app", "evaluating", "main", "models", "packing", "training"]
