"""The command line: parse, call, print."""

from moefit.cli import models, training
from moefit.cli.app import app, main

__all__ = ["app", "main", "models", "training"]
