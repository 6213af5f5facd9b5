"""Turn finished runs of configs/reference*.yaml into the model that ships with moefit.

Casts the last checkpoint of the second stage to bf16 and adds the resolved configuration and log of
each stage, and its measured scores.

    python benchmarks/ship_reference.py STAGE_1 STAGE_2 [DENSE_STAGE_2]
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.loading import load_full_model, reference_path
from moefit.evaluate.passage import held_out_text
from moefit.evaluate.perplexity import Score, score
from moefit.evaluate.report import score_table
from moefit.moe.routing import Rule
from moefit.train.config import make_config

RULES = (
    "dense",
    "top_k:8",
    "top_k:4",
    "top_k:3",
    "threshold:0.25",
    "threshold:0.4",
    "threshold:0.48",
    "threshold:0.7",
    "threshold:1",
)
SCORED_TOKENS = 32_768


def main() -> None:
    first, second, *twin = map(Path, sys.argv[1:])
    model, tokenizer = load_full_model(str(second), dtype=torch.bfloat16)
    assert isinstance(model, DsMoeForCausalLM)
    model.set_inference_rule("threshold:0.7")
    place = reference_path()
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    _beside(first, place, "stage1-", {"out": "runs/reference"})
    _beside(second, place, "", {"out": "runs/reference-stage2", "start_from": "runs/reference"})
    scores = measured("reference", *RULES)
    beside = {"reference": [one.as_dict() for one in scores]}
    if twin:
        beside["plain dense twin"] = [one.as_dict() for one in measured(str(twin[0]), "dense")]
    (place / "scores.json").write_text(json.dumps(beside, indent=1) + "\n")
    size = sum(path.stat().st_size for path in place.iterdir())
    print(f"{place}: {size / 1e6:.1f} MB")


def _beside(run: Path, place: Path, prefix: str, places: dict[str, str]) -> None:
    """Write a run's log and its configuration with the folders of configs/."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config = make_config(config | places).model_dump(mode="json")
    (place / f"{prefix}train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copy(run / "log.jsonl", place / f"{prefix}log.jsonl")


def measured(model: str, *rules: str) -> list[Score]:
    """Score a model on windows of the held-out standard library, in its stored dtype."""
    loaded, tokenizer = load_full_model(model)
    assert isinstance(loaded, DsMoeForCausalLM)
    text = held_out_text(tokenizer, 256, SCORED_TOKENS)
    scores = score(loaded, text, [Rule.parse(rule) for rule in rules])
    Console(width=120).print(score_table(scores, model))
    return scores


if __name__ == "__main__":
    main()
