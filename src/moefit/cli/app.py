"""The application `moefit`: its table of commands, what they share, and the entry point.

The module of a command is imported when the command is run, so that `moefit --help` and
`moefit --version` import neither torch nor transformers.
"""

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import moefit
from moefit import errors
from moefit.errors import ConfigError, ElsewhereError, LostProcessError, MoefitError
from moefit.host import processors

# How many compiled primitives oneDNN's two caches hold. In 16 bits every sequence length has its
# own; the default of a thousand each takes hundreds of MiB.
PROGRAM_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# After each parallel operation of torch OpenMP's threads spin for milliseconds, on the cores that
# the kernels' threads need. Training, all of whose work torch does, gains by it.
SERVING = ("serve", "generate", "chat", "bench", "eval", "profile")
ADVANCED = "Advanced"
"""The help panel of options that few users need."""
COMMANDS = {
    "serve": ("serve", "Serve a model over HTTP: OpenAI's API, a status page, metrics."),
    "generate": ("models", "Continue a prompt, streaming."),
    "chat": ("chat", "Chat with a model, on a server (--url) or loaded in this process."),
    "bench": ("models", "Measure prefill and decoding speed, and what limits them."),
    "eval": ("evaluate", "Measure perplexity and cost, by inference rule or in a memory budget."),
    "report": (
        "scores.report",
        "Write one page about training runs: a model card with pictures.",
    ),
    "push": ("scores.push", "Upload a model with its card to the Hugging Face Hub."),
    "describe": ("models", "Show a model's parameters and memory estimate without loading it."),
    "pack": ("pack", "Encode a model's experts once, so that serving need not."),
    "cache": ("pack", "Show or remove what is kept in the cache folder, such as packed experts."),
    "profile": ("plan", "Measure a model on this machine, for `moefit plan`."),
    "plan": ("plan", "Predict what a memory budget costs, and choose a configuration."),
    "advise": ("advise.advise", "Choose what to train for a training budget and serving limits."),
    "law": ("advise.law", "Show scaling laws, or fit one to training runs."),
    "simulate": (
        "advise.simulate",
        "Simulate which experts to fetch to a GPU and which to compute where they lie.",
    ),
    "budget": ("budget", "Show or change the memory budget of a running server."),
    "train": ("train", "Train a model: CONFIG.yaml, then settings such as optimizer.lr=3e-4."),
    "adapt": ("train", "Fine-tune a model so that it loses little with few experts in memory."),
    "export": ("export", "Write a model for transformers and vLLM, or as GGUF for llama.cpp."),
    "convert": ("export", "Write a model with pickled weights (.bin) as safetensors."),
    "demo": ("train", "Train a small DS-MoE for a minute, then evaluate and serve a shipped one."),
}
"""Module in `moefit.cli` and help text of each command, in the order of `moefit --help`."""


class LazyGroup(TyperGroup):
    """The commands in `COMMANDS`, each imported when it is run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        registered = self.commands
        self.commands = {
            name: registered.get(name) or TyperCommand(name, help=help)
            for name, (_, help) in COMMANDS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the module of the command in `args` first."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = _imported(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train mixture-of-experts models, and serve them inside a memory budget.",
)
console = Console(stderr=True)
_LOG = logging.getLogger(__name__)


def logs_json() -> bool:
    """Return whether `serve --log-json` has set up logs, which no other line may interrupt."""
    return _LOG.isEnabledFor(logging.INFO)


def status(what: str) -> AbstractContextManager[object]:
    """Show what is being done within the block."""
    return nullcontext() if logs_json() else console.status(what)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar within the block; it is given a name, how many are done, and how many there are.

    Args:
        what: Shown until the first call.
    """
    if logs_json():
        yield lambda name, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield show


def option(help: str, *names: str, **settings: Any) -> Any:
    """Return an option; `settings` are those of `typer.Option`."""
    return typer.Option(*names, help=help, **settings)


def advanced(help: str, *names: str, **settings: Any) -> Any:
    """Return an option that `--help` shows in the panel "Advanced"."""
    return option(help, *names, rich_help_panel=ADVANCED, **settings)


class ModeName(StrEnum):
    """What happens when an expert is not resident."""

    exact = "exact"
    bounded = "bounded"
    virtual = "virtual"


Json = Annotated[bool, option("Print JSON instead of tables.", "--json")]
Mode = Annotated[
    ModeName | None,
    option(
        "For experts that are not in memory. exact: fetch; bounded: substitute up to --bound; "
        "virtual: always substitute (SwapMoE). Default at start: exact."
    ),
]
Prefill = Annotated[
    ModeName | None, advanced("Mode for prompts. Default: exact, or virtual in mode virtual.")
]
BOUND = "Mode bounded: maximum share of a token's router weight that is substituted."
ApiKey = Annotated[str | None, advanced("API key of the server.", envvar="MOEFIT_API_KEY")]


def command(name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers a function as the command `name` of `COMMANDS`."""
    return app.command(name=name, help=COMMANDS[name][1], **settings)


def _imported(name: str) -> Any:
    """Import the module of a command, and return the command."""
    import_module(f"moefit.cli.{COMMANDS[name][0]}")
    if "transformers" in sys.modules:
        theirs = import_module("transformers.utils.logging")
        theirs.disable_progress_bar()
        theirs.set_verbosity_error()
    group = typer.main.get_group(app)
    return group.commands[name]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        print(moefit.__version__)
        raise typer.Exit


def stopped(by: str) -> typer.Exit:
    """Return the exit that a shell reports for a program ended by that signal."""
    return typer.Exit(128 + signal.Signals[by])


def say(text: str, *, level: int = logging.INFO) -> None:
    """Print a line to standard error, without markup: a path may have brackets.

    Args:
        text: The line.
        level: Where logs are JSON (`serve --log-json`), it is logged instead, at this level.
    """
    if logs_json():
        _LOG.log(level, "%s", text)
        return
    console.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value to standard output as JSON."""
    print(json.dumps(value, indent=1))


def main() -> NoReturn:
    """Run the command line. Users' errors are one line on standard error and exit code 2.

    With `--json` they are an object on standard output too: see `error_of`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that isn't UTF-8 gets "?"
            stream.reconfigure(errors="replace")
    for cache in PROGRAM_CACHES:
        os.environ.setdefault(cache, "128")
    _set_threads()
    if sys.argv[1:2] and sys.argv[1] in SERVING:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except ElsewhereError:
        sys.exit(2)
    except MoefitError as error:
        _say_error(error)
        if "--json" in sys.argv:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        if isinstance(error, LostProcessError):
            _end_at_once(2)
        sys.exit(2)
    sys.exit(0)


def _set_threads() -> None:
    """Set the number of threads, unless it is given, before torch is imported and reads it."""
    if os.environ.get("OMP_NUM_THREADS", "").strip():  # OpenMP takes an empty one for none
        os.environ.setdefault("MKL_DYNAMIC", "FALSE")  # or MKL takes fewer, and torch as many as it
    else:
        os.environ["OMP_NUM_THREADS"] = str(processors().threads)


def _end_at_once(code: int) -> NoReturn:
    """End without waiting for threads: one that saves may wait for a lost process's part."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _say_error(error: MoefitError) -> None:
    if logs_json():
        _LOG.error("%s", error, extra={"fields": {"error": type(error).__name__}})
        return
    console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
    say(str(error))


def error_of(output: str) -> MoefitError | None:
    """Return the error that a command with `--json` ended with.

    Args:
        output: What the command wrote to standard output.

    Returns:
        An error of the same class, or None if the output does not end with one.
    """
    try:
        found = json.loads(output)["error"]
        kind, message = getattr(errors, found["type"], None), found["message"]
    except (ValueError, LookupError, TypeError):
        return None
    if isinstance(kind, type) and issubclass(kind, MoefitError):
        return kind(message)
    return ConfigError(message)
