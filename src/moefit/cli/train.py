"""Commands that train models: train, adapt, demo."""

import logging
import warnings
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moefit import demo as demonstration
from moefit.cli.app import Json, advanced, command, console, option, print_json, say, stopped
from moefit.cli.loading import dropout_line
from moefit.cli.options import Model
from moefit.evaluate.loading import check_family, load_full_model, locate
from moefit.moe.expert_dropout import dropout_record
from moefit.train.adapt import adapt_config, write_adapted
from moefit.train.config import read_config
from moefit.train.display import NoDisplay, display
from moefit.train.loop import train as run_training
from moefit.train.parallel.processes import joined_processes


@command("train")
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...",
            help="YAML file, then settings such as steps=100.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Without CONFIG.yaml all settings have their defaults; the corpus is the standard library."""
    first, *rest = arguments or [""]
    has_file = bool(first) and "=" not in first
    overrides = rest if has_file else [argument for argument in (first, *rest) if argument]
    with joined_processes() as processes:
        if not processes.is_main:  # the same warnings again
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        config = processes.agreed(lambda: read_config(Path(first) if has_file else None, overrides))
        with display(console) if processes.is_main else nullcontext(NoDisplay()) as callback:
            result = run_training(config, callback, processes)
    if not processes.is_main:
        raise typer.Exit if result.stopped_by is None else stopped(result.stopped_by)
    if as_json:
        print_json(
            {
                "step": result.step,
                "checkpoint": str(result.checkpoint),
                "held_out_loss": result.held_out_loss,
                "stopped_by": result.stopped_by,
            }
        )
    if result.stopped_by is not None:
        say(
            f"{result.stopped_by}: saved {result.checkpoint} and stopped at step {result.step} "
            f"of {config.steps}; the same command resumes there"
        )
        raise stopped(result.stopped_by)
    say(f"done: {result.checkpoint}; curve: {Path(config.out) / 'curve.png'}")
    say(f"next: moefit eval {config.out}")


class OrderName(StrEnum):
    """Which experts stay in a sequence that has few of them."""

    random = "random"
    nested = "nested"
    mixed = "mixed"


class SizesName(StrEnum):
    """How many experts stay."""

    uniform = "uniform"
    few = "few"


class TrainableName(StrEnum):
    """Which weights an adaptation trains."""

    all = "all"
    routers = "routers"
    low_rank = "low_rank"


@command("adapt")
def adapt(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[list[str], option("Text file or folder to train on; may be repeated.")],
    steps: Annotated[int, option("Number of training steps.", min=1)] = 400,
    trainable: Annotated[
        TrainableName,
        option("all: all weights; routers: routers and norms; low_rank: and changes of experts."),
    ] = TrainableName.all,
    rank: Annotated[int, advanced("Of the changes of experts, with low_rank.", min=1)] = 8,
    order: Annotated[
        OrderName, advanced("Which experts stay, as in expert_dropout.order.")
    ] = OrderName.nested,
    sizes: Annotated[
        SizesName, advanced("Distribution of their number, as in expert_dropout.sizes.")
    ] = SizesName.few,
    share: Annotated[float, advanced("Share of sequences with few experts.", min=0, max=1)] = 0.75,
    least: Annotated[
        int | None, advanced("Minimum number of experts. Default: those of one token.", min=1)
    ] = None,
    lr: Annotated[float, option("Peak learning rate.", min=0)] = 5e-4,
    batch_size: Annotated[int, option("Sequences per step.", min=1)] = 4,
    seq_len: Annotated[int | None, advanced("Tokens per sequence. Default: 256.", min=2)] = None,
    seed: Annotated[int, advanced("Random seed of batches and dropout.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Resume where the same command was stopped."""
    folder = locate(model)
    check_family(folder)
    settings = {
        "data": {"sources": text},
        "expert_dropout": {
            "order": order.value,
            "share": share,
            "sizes": sizes.value,
            "least": least,
            "begin": 0.0,
        },
        "trainable": trainable.value,
        "rank": rank,
        "optimizer": {"lr": lr},
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        **({} if seq_len is None else {"seq_len": seq_len}),
    }
    config = adapt_config(folder, out, settings)
    with display(console) as callback:
        result = run_training(config, callback)
    if result.stopped_by is not None:
        say(f"{result.stopped_by}: stopped at step {result.step}; the same command resumes there")
        raise stopped(result.stopped_by)
    write_adapted(folder, result.checkpoint, out)
    record = dropout_record(load_full_model(str(out))[0].config)
    assert record is not None
    if as_json:
        print_json({"out": str(out), "expert_dropout": record.as_dict()})
    say(f"wrote {out}: {dropout_line(record)}")


@command("demo")
def demo(
    out: Annotated[Path, option("Folder for the run and the picture.")] = Path("runs/demo"),
    seconds: Annotated[int, option("Training time in seconds.", min=5)] = 60,
    as_json: Json = False,
) -> None:
    """Print only what was measured in this run."""
    result = demonstration.run(out, seconds=seconds, console=console)
    if as_json:
        print_json(result)
    if result["training"]["stopped_by"] is not None:
        raise stopped(result["training"]["stopped_by"])
