"""The command line: parse, call, print."""

from moefit.cli import models, packing, planning, training
from moefit.cli.app import app, main

__all__ = ["app", "main", "models", "packing", "planning", "training"]
