"""The command line: parse, call, print."""

import io
import json
import signal
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import moefit
from moefit import demo as demonstration
from moefit.dsmoe.card import model_card
from moefit.dsmoe.card_view import card_table
from moefit.dsmoe.export import export_olmoe
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.presets import preset_names
from moefit.errors import DataError, MoefitError
from moefit.evaluate.loading import REFERENCE, config_of, load
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.evaluate.perplexity import score
from moefit.evaluate.report import score_table
from moefit.evaluate.subject import subject_of
from moefit.moe.routing import Rule
from moefit.train.config import read_config
from moefit.train.display import display
from moefit.train.loop import train as run_training

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


@app.command(help="Train a model densely: CONFIG.yaml, then settings such as optimizer.lr=3e-4.")
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [key=value]...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Without CONFIG.yaml every setting has its default; the corpus is the standard library."""
    first, *rest = arguments or [""]
    has_file = bool(first) and "=" not in first
    overrides = rest if has_file else [argument for argument in (first, *rest) if argument]
    config = read_config(Path(first) if has_file else None, overrides)
    with display(console) as watcher:
        result = run_training(config, watcher)
    if as_json:
        _print_json(
            {
                "step": result.step,
                "checkpoint": str(result.checkpoint),
                "held_out_loss": result.held_out_loss,
                "stopped_by": result.stopped_by,
            }
        )
    if result.stopped_by is not None:
        _say(
            f"{result.stopped_by}: saved {result.checkpoint} and stopped at step {result.step} "
            f"of {config.steps}; the same command goes on from there"
        )
        raise _stopped(result.stopped_by)
    _say(f"done: {result.checkpoint}; curve: {Path(config.out) / 'curve.png'}")
    _say(f"next: moefit eval {config.out}")


@app.command(name="eval", help="Perplexity and cost of a model under each inference rule.")
def evaluate(
    model: Model = REFERENCE,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file; the held-out standard library if not given"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="dense, top_k:K, threshold:EPS, threshold_top_k:EPS; may be repeated"),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens the model sees at once")] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="predict about this many, spread over the text")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="the checkpoint's own if not given")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Scores every rule on the same windows of the same text."""
    rules = [Rule.parse(one) for one in rule or []]
    loaded, tokenizer = load(model, device=device, dtype=dtype.torch if dtype else None)
    rules = rules or subject_of(loaded).default_rules()
    source = held_out_text if text is None else lambda *rest: text_of_file(text, *rest)
    passage = source(tokenizer, context, max_tokens)
    with console.status("scoring") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        scores = score(loaded, passage, rules, tell)
    if as_json:
        _print_json([one.as_dict() for one in scores])
    else:
        title = f"{model} on {text or 'the held-out standard library'}"
        Console().print(score_table(scores, title))


@app.command(help="Continue a prompt, streaming.")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    rule: Annotated[
        str | None, typer.Option(help="inference rule; the model's own if none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
) -> None:
    """Writes the continuation to standard output as it comes."""
    chosen = None if rule is None else Rule.parse(rule)
    loaded, tokenizer = load(model, device=device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt is empty; give at least one character")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    torch.manual_seed(seed)
    with nullcontext() if chosen is None else subject_of(loaded).use(chosen):
        loaded.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True),
            **sampling,
        )


@app.command(help="Parameters, bytes and FLOPs of a preset or a model, from its shape alone.")
def describe(
    model: Annotated[
        str, typer.Argument(help=f"a preset, or as for eval: {', '.join(preset_names())}")
    ],
    as_json: Json = False,
) -> None:
    """Allocates no weights."""
    card = model_card(config_of(model))
    if as_json:
        _print_json(card.as_dict())
    else:
        Console().print(card_table(card, escape(model)))


@app.command(help="Write a checkpoint that plain transformers, vLLM and llama.cpp load (OLMoE).")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    experts_per_token: Annotated[int, typer.Option("--experts-per-token", "-k", min=1)],
    dtype: Annotated[Dtype | None, typer.Option(help="the model's own if not given")] = None,
) -> None:
    """Verified: the written checkpoint's logits equal ours at top_k:K."""
    loaded, tokenizer = load(model)
    if isinstance(loaded, DsMoeForCausalLM):  # K is given here, so a threshold is no obstacle
        renormalize = Rule.parse(loaded.config.inference_rule).renormalize
        loaded.set_inference_rule(Rule(kind="top_k", k=experts_per_token, renormalize=renormalize))
    export_olmoe(
        loaded,
        out,
        experts_per_token=experts_per_token,
        tokenizer=tokenizer,
        dtype=dtype.torch if dtype else None,
    )
    _say(f"wrote {out}: an OLMoE checkpoint with {experts_per_token} experts per token")


@app.command(help="Train a small DS-MoE for a minute, then measure the shipped one.")
def demo(
    out: Annotated[Path, typer.Option(help="folder for the run and the picture")] = Path(
        "runs/demo"
    ),
    seconds: Annotated[int, typer.Option(min=5, help="how long to train")] = 60,
    as_json: Json = False,
) -> None:
    """Everything that it prints was measured there and then."""
    result = demonstration.run(out, seconds=seconds, console=console)
    if as_json:
        _print_json(result)
    if result["training"]["stopped_by"] is not None:
        raise _stopped(result["training"]["stopped_by"])


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", is_eager=True)] = False) -> None:
    if version:
        print(moefit.__version__)
        raise typer.Exit


def _stopped(by: str) -> typer.Exit:
    """The exit code that a shell gives a program ended by that signal."""
    return typer.Exit(128 + signal.Signals[by])


def _say(text: str) -> None:
    """One line for people; a path in it may have brackets and be long."""
    console.print(text, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def main() -> NoReturn:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that isn't UTF-8 gets "?"
            stream.reconfigure(errors="replace")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        app()
    except MoefitError as error:
        console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        _say(str(error))
        sys.exit(2)
    sys.exit(0)
