"""Write a recommendation as a configuration that `moefit train` runs.

The law gives the model, its tokens and the learning rate. Sequence length, batch and warm-up are
conventions: batches of 2^19 tokens and a warm-up of 3% as in Yun et al. (arXiv 2404.02852), both
smaller for short runs.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moefit.advise.recommend import Advice
from moefit.advise.search import Candidate
from moefit.advise.shapes import short_count
from moefit.errors import ConfigError
from moefit.train.config import make_config
from moefit.train.settings import STDLIB

_BATCH_TOKENS = 1 << 19  # at most
_STEPS = 20_000  # at least, for runs whose batches are smaller
_SEQUENCES = 16  # per forward pass; more are accumulated
_LENGTHS = ((1e9, 2048), (1e8, 1024), (1e7, 512), (0.0, 256))  # tokens of a sequence, by D
_WARMUP, _MOST_WARMUP = 0.03, 2000
_BALANCING = 0.01  # weight of Switch Transformer's load-balancing loss
_OUT = "runs/advised"


def train_config(candidate: Candidate, sources: Sequence[str] = (STDLIB,)) -> dict[str, Any]:
    """Return the settings of a training run.

    Args:
        candidate: The model and its tokens.
        sources: Text to train on, as in `data.sources`.

    Returns:
        A tree that `make_config` accepts.
    """
    shape, tokens = candidate.shape, candidate.tokens
    length = next(length for least, length in _LENGTHS if tokens >= least)
    batch = min(_BATCH_TOKENS, tokens / _STEPS)
    sequences = max(1, round(batch / length))
    at_once = min(_SEQUENCES, sequences)
    accumulation = max(1, round(sequences / at_once))
    steps = max(2, round(tokens / (at_once * accumulation * length)))
    every = max(200, steps // 200)
    positions = max(length, candidate.sizes.budget.context or 0)  # serving reads longer sequences
    tree = {
        "out": _OUT,
        "model": {"architecture": "dsmoe", **shape.model_fields(positions)},
        "data": {"sources": list(sources), "vocab_size": shape.vocabulary},
        **({"loss": {"load_balancing": _BALANCING}} if shape.num_experts > 1 else {}),
        "optimizer": {
            "lr": float(f"{shape.learning_rate:.3g}"),
            "warmup_steps": min(_MOST_WARMUP, int(_WARMUP * steps)),
        },
        "checkpoint": {"every": every},
        "log": {"eval_every": every},
        "steps": steps,
        "seq_len": length,
        "batch_size": at_once,
        "accumulation": accumulation,
    }
    make_config(tree)
    return tree


def write_config(advice: Advice, path: Path, sources: Sequence[str] = (STDLIB,)) -> None:
    """Write the recommended run, with comments on where it comes from.

    Args:
        advice: The recommendation.
        path: A .yaml file; an existing one is not overwritten.
        sources: Text to train on.

    Raises:
        ConfigError: The file exists or cannot be written.
    """
    chosen, law = advice.chosen, advice.question.law
    comment = (
        f"Recommended by `moefit advise` for {advice.question.flops:.3g} FLOPs: "
        f"{chosen.shape.describe()}; {short_count(chosen.shape.active)} of "
        f"{short_count(chosen.shape.total)} parameters active, {short_count(chosen.tokens)} "
        f"training tokens. Law: {law.source}. Its tokens are seen once: name text of that size in "
        "data.sources. Learning rate: Ludziejewski et al. 2025; batch and warm-up: Yun et al. 2024."
    )
    lines = textwrap.wrap(comment, 98, initial_indent="# ", subsequent_indent="# ")
    text = yaml.safe_dump(train_config(chosen, sources), sort_keys=False)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n" + text)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; give another name, or remove it first") from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; name a file in a folder that can be written to"
        ) from error
