"""`moefit demo`: train a small DS-MoE, score it and the shipped model, and serve the latter.

All numbers are measured while it runs.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from moefit import demo_serving
from moefit.dsmoe.card import model_card
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import REFERENCE, load_full_model, locate
from moefit.evaluate.passage import held_out_text
from moefit.evaluate.perplexity import Score, score
from moefit.evaluate.report import score_table
from moefit.moe.routing import Rule, default_rules
from moefit.train.config import TrainConfig, make_config
from moefit.train.data.tokens import prepare
from moefit.train.display import TrainingCallback, display
from moefit.train.loop import Trainer, train

EVAL_TOKENS = 16_384
PROMPT = "def read_config(path):\n"
SAMPLE_RULE = "top_k:3"
MODES = (
    "exact fetches missing experts from storage; bounded substitutes others if little router "
    "weight is lost; virtual uses resident experts only (SwapMoE); auto keeps all experts, at the "
    "precision that fits"
)
MARK = ".moefit-demo"  # file in folders that a later demo may delete


def run(out: Path, *, seconds: int, console: Console) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: Folder for the training run and the figure.
        seconds: Approximate duration of training.
        console: Where to print.

    Returns:
        All results, for JSON; only those of training if a signal stopped it.

    Raises:
        CheckpointError: `out`/run was not created by a demo, or cannot be written.
    """
    console.rule("1. training a small DS-MoE on the standard library's source")
    trained = _train(out / "run", seconds, console)
    if trained["stopped_by"] is not None:
        _print(console, f"{trained['stopped_by']}: stopped at step {trained['steps']}")
        return {"training": trained}
    console.rule("2. the model that ships with moefit, by inference rule")
    reference = _scores(REFERENCE)
    console.print(score_table(reference, "reference model on the held-out standard library"))
    sample = _sample()
    share = f"{sample['active_share']:.0%} of its parameters (without embeddings)"
    _print(console, f"text generated with {share}:")
    _print(console, sample["text"])
    small = _scores(str(out / "run"))
    console.print(score_table(small, f"the model trained above ({trained['tokens']:,} tokens)"))
    console.rule("3. the shipped model with less and less memory for its experts")
    console.print(MODES, markup=False, highlight=False)
    served = demo_serving.run(console)
    picture = out / "demo.png"
    draw(reference, small, served, picture)
    _print(console, f"figure: {picture}, training curve: {out / 'run' / 'curve.png'}")
    console.print("next:", style="bold")
    for command in (
        f'generate {REFERENCE} "def main():" --rule {SAMPLE_RULE}',
        "train my.yaml data.sources=[FOLDER] out=runs/mine",
        "describe MODEL --memory 4.7GiB",
        'generate MODEL "def main():" --memory 4.7GiB --mode bounded',
    ):
        _print(console, f"  moefit {command}")
    return {
        "training": trained,
        "reference": [one.as_dict() for one in reference],
        "trained": [one.as_dict() for one in small],
        "answer": sample,
        "serving": [row.as_dict() for row in served],
        "picture": str(picture),
    }


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _train(out: Path, seconds: int, console: Console) -> dict[str, Any]:
    _recreate(out)
    with display(console) as callback:
        config = _config(out, steps=_steps_in(_config(out, steps=1000), seconds, callback))
        result = train(config, callback)
    return {
        "steps": result.step,
        "tokens": result.step * config.batch_size * config.accumulation * config.seq_len,
        "held_out_loss": result.held_out_loss,
        "checkpoint": str(result.checkpoint),
        "stopped_by": result.stopped_by,
    }


def _recreate(folder: Path) -> None:
    """Create an empty folder, deleting one that an earlier demo created."""
    try:
        if (folder / MARK).is_file():
            shutil.rmtree(folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} exists and was not created by a demo (it has no {MARK}), so it is not "
                "deleted; give another folder with --out, or remove it first"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder}: {error.strerror}; give another folder with --out"
        ) from error


def _config(out: Path, steps: int) -> TrainConfig:
    """Return a configuration with the shipped model's text and tokenizer."""
    return make_config(
        {
            "out": str(out),
            "model": {"preset": "dsmoe-tiny"},
            "data": {"max_bytes": 4_000_000, "tokenizer": str(locate(REFERENCE))},
            "loss": {"mlp_mi": 0.01},
            "optimizer": {"lr": 4e-3, "warmup_steps": max(1, steps // 20)},
            "log": {"eval_every": max(10, steps // 3), "eval_tokens": EVAL_TOKENS},
            "checkpoint": {"every": steps, "keep": 1},
            "steps": steps,
            "batch_size": 8,
        }
    )


def _steps_in(config: TrainConfig, seconds: int, callback: TrainingCallback) -> int:
    """Estimate the steps that this machine can do in `seconds` by timing a few."""
    data = prepare(config.data, seq_len=config.seq_len, progress=callback.on_prepare)
    trainer = Trainer(config, Path(config.out), data, callback)
    trainer.log.close()
    batch = trainer.batches.batch(0)
    trainer.stepper.step([batch], 1)
    timed = 5
    began = time.perf_counter()
    for _ in range(timed):
        trainer.stepper.step([batch], 1)
    return max(30, int(seconds * timed / (time.perf_counter() - began)))


def _scores(model: str) -> list[Score]:
    loaded, tokenizer = load_full_model(model)
    use_kernels(loaded)
    assert isinstance(loaded, DsMoeForCausalLM)
    text = held_out_text(tokenizer, context=256, max_tokens=EVAL_TOKENS)
    return score(loaded, text, default_rules(loaded.config.num_experts))


def _sample() -> dict[str, Any]:
    """Generate text with the shipped model and few experts; return it and the active share."""
    loaded, tokenizer = load_full_model(REFERENCE)
    use_kernels(loaded)
    assert isinstance(loaded, DsMoeForCausalLM)
    loaded.set_inference_rule(SAMPLE_RULE)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = loaded.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs, **sampling, max_new_tokens=48, pad_token_id=tokenizer.eos_token_id
        )
    card = model_card(loaded.config)
    active = card.active(Rule.parse(SAMPLE_RULE)) / card.total_without_embeddings
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    return {"rule": SAMPLE_RULE, "active_share": active, "text": text}


def draw(
    reference: list[Score], trained: list[Score], served: list[demo_serving.Row], path: Path
) -> None:
    """Plot perplexity over active parameters and over memory."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right, last = figure.subplots(1, 3)
    for axes, scores, title in (
        (left, reference, "shipped reference model"),
        (right, trained, "model trained in this demo"),
    ):
        for one in scores:
            axes.plot(100 * one.active_share, one.perplexity, "o", label=one.rule)
        axes.set_title(title)
        axes.set_xlabel("active parameters, % (without embeddings)")
        axes.set_ylabel("held-out perplexity")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    demo_serving.draw(last, served)
    figure.savefig(path, dpi=120)
