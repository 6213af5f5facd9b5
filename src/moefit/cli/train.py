"""Commands that train and export models: train, export, demo."""

from pathlib import Path
from typing import Annotated

import typer

from moefit import demo as demonstration
from moefit.cli.app import command, console, print_json, say, stopped
from moefit.cli.options import Dtype, Json, Model, option, torch_dtype
from moefit.dsmoe.export import export_olmoe
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.loading import load_full_model
from moefit.moe.routing import Rule
from moefit.train.config import read_config
from moefit.train.display import display
from moefit.train.loop import train as run_training


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
    config = read_config(Path(first) if has_file else None, overrides)
    with display(console) as callback:
        result = run_training(config, callback)
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


@command("export")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    experts_per_token: Annotated[
        int, option("Number of experts that each token uses.", "--experts-per-token", "-k", min=1)
    ],
    dtype: Annotated[
        Dtype | None, option("Dtype of the checkpoint. Default: the model's own.")
    ] = None,
) -> None:
    """Write a checkpoint whose logits are verified to equal the model's at top_k:K."""
    loaded, tokenizer = load_full_model(model)
    if isinstance(loaded, DsMoeForCausalLM):  # K is given here, so a threshold is no obstacle
        renormalize = Rule.parse(loaded.config.inference_rule).renormalize
        loaded.set_inference_rule(Rule(kind="top_k", k=experts_per_token, renormalize=renormalize))
    export_olmoe(
        loaded,
        out,
        experts_per_token=experts_per_token,
        tokenizer=tokenizer,
        dtype=torch_dtype(dtype),
    )
    say(f"wrote {out}: an OLMoE checkpoint with {experts_per_token} experts per token")


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
