"""The command line's frame: the application, what its commands share, and its end.

A command's own file parses, calls and prints; nothing else does.
"""

import io
import json
import os
import signal
import sys
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

import moefit
from moefit import errors
from moefit.errors import ConfigError, MoefitError
from moefit.evaluate.loading import REFERENCE

# How many compiled products torch's two caches keep on a CPU; in 16 bits every length of text has
# its own, and a thousand of each, which is what they would keep, are hundreds of MiB.
PROGRAM_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help=f"model folder, training run, or '{REFERENCE}'")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


class Dtype(StrEnum):
    """Dtypes that a model can be loaded or written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of that name."""
        return getattr(torch, self.value)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", is_eager=True)] = False) -> None:
    if version:
        print(moefit.__version__)
        raise typer.Exit


def stopped(by: str) -> typer.Exit:
    """The exit code that a shell gives a program ended by that signal."""
    return typer.Exit(128 + signal.Signals[by])


def say(text: str) -> None:
    """One line for people; a path in it may have brackets and be long."""
    console.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """To standard output, for programs."""
    print(json.dumps(value, indent=1))


def main() -> NoReturn:
    """Entry point: a user's mistake is one line on standard error and exit code 2.

    With `--json` it is an object on standard output too, for programs: see `error_of`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that isn't UTF-8 gets "?"
            stream.reconfigure(errors="replace")
    for cache in PROGRAM_CACHES:
        os.environ.setdefault(cache, "128")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        app()
    except MoefitError as error:
        console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        say(str(error))
        if "--json" in sys.argv:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        sys.exit(2)
    sys.exit(0)


def error_of(output: str) -> MoefitError | None:
    """Return the error that a command with `--json` ended with.

    Args:
        output: What the command wrote to standard output.

    Returns:
        An error of the same class, or None if the output does not end with one.
    """
    try:
        told = json.loads(output)["error"]
        kind, message = getattr(errors, told["type"], None), told["message"]
    except (ValueError, LookupError, TypeError):
        return None
    if isinstance(kind, type) and issubclass(kind, MoefitError):
        return kind(message)
    return ConfigError(message)
