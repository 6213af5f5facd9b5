"""The command line: parse, call, print."""

from moefit.cli import chat, models, packing, server, training
from moefit.cli.app import app, main

__all__ = ["app", "chat", "main", "models", "packing", "server", "training"]
