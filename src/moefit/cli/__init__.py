"""The command line: parse, call, print."""

from moefit.cli import budget, chat, evaluating, models, packing, planning, server, training
from moefit.cli.app import app, main

__all__ = [
    "app",
    "budget",
    "chat",
    "evaluating",
    "main",
    "models",
    "packing",
    "planning",
    "server",
    "training",
]
