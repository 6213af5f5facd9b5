"""The command line: parse, call, print."""

from moefit.cli import budget, chat, evaluate, models, pack, plan, serve, train
from moefit.cli.app import app, main

__all__ = [
    "app",
    "budget",
    "chat",
    "evaluate",
    "main",
    "models",
    "pack",
    "plan",
    "serve",
    "train",
]
