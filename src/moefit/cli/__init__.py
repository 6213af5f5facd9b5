"""The command line: parse, call, print. Each command's module is imported when it is run."""

from moefit.cli.app import app, main

__all__ = ["app", "main"]
