"""Fine-tune a small sparse model into a pre-gated one, beside its base at equal further tokens.

A base is trained; from it runs go on with the same text, seeds and rates: the base, a model whose
routers are given what the block before is, one whose tokens are routed by the logits of the token
before and one that also sees the token's embedding, each also with KL to the old routers. Runs are
resumed where they stopped.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import record

from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING, PREVIOUS_TOKEN
from moefit.train.config import make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train

MODEL = {
    "architecture": "dsmoe",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_experts": 16,
    "max_position_embeddings": 128,
    "qk_norm": True,
    "tie_word_embeddings": True,
    "training_rule": "top_k:2:renormalize",
    "inference_rule": "top_k:2:renormalize",
    "routed_scaling_factor": 2,
}
# Name, `pregated`, weight of the KL to the old routers.
RUNS = (
    ("base", False, 0.0),
    ("pregated", True, 0.0),
    ("pregated-kl", True, 0.03),
    ("previous-token", PREVIOUS_TOKEN, 0.0),
    ("previous-token-kl", PREVIOUS_TOKEN, 0.03),
    ("embedding", PREVIOUS_AND_EMBEDDING, 0.0),
    ("embedding-kl", PREVIOUS_AND_EMBEDDING, 0.03),
)


def config(given: Any, name: str, steps: int, rate: float, **changes: Any) -> Any:
    return make_config(
        {
            "out": str(given.out / name),
            "model": {**MODEL, **changes.pop("model", {})},
            "data": {
                "sources": [str(given.text)],
                "held_out_fraction": 0.05,
                "vocab_size": 1024,
                "max_bytes": 12_000_000,
                "cache_dir": str(given.out / "data"),
            },
            "loss": {"load_balancing": 0.005, **changes.pop("loss", {})},
            "optimizer": {"lr": rate, "warmup_steps": min(20, steps // 10)},
            "log": {
                "every": 50,
                "eval_every": 100,
                "eval_tokens": changes.pop("eval_tokens", 131_072),
            },
            "checkpoint": {"every": 50, "keep": 1},
            "steps": steps,
            "seq_len": 128,
            "batch_size": 8,
            **changes,
        }
    )


def finish(one: Any) -> None:
    """Train, or go on where it stopped; end this program if it is stopped again."""
    if (stopped := train(one, NoDisplay()).stopped_by) is not None:
        raise SystemExit(f"stopped by {stopped}; the same command resumes")


def held_out(folder: Path) -> dict[int, float]:
    """Return the loss on held-out text by step."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {one["step"]: one["loss"] for one in lines if one["kind"] == "eval"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="file or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=600, help="of the base, 1,024 tokens each")
    parser.add_argument("--more", type=int, default=300, help="further steps")
    parser.add_argument("--begin", type=Path, help="model or run to start from; none is trained")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of further steps")
    parser.add_argument("--runs", nargs="+", choices=[one[0] for one in RUNS])
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    begin, losses = given.begin, dict[str, dict[int, float]]()
    if begin is None:
        begin = given.out / "start"
        finish(config(given, "start", given.steps, 3e-3))
        losses["start"] = held_out(begin)
    runs = [one for one in RUNS if given.runs is None or one[0] in ("base", *given.runs)]
    for name, pregated, kl in runs:
        loss = {"load_balancing": 0.0, "gate_kl": kl} if pregated else {}
        more = config(
            given, name, given.more, given.rate, seed=1, loss=loss, eval_tokens=65_536,
            model={"pregated": pregated}, start_from=str(begin),
        )  # fmt: skip
        finish(more)
        losses[name] = held_out(given.out / name)
        print(name, losses[name], flush=True)
    last = {name: list(one.values())[-1] for name, one in losses.items()}
    changes = {name: math.expm1(last[name] - last["base"]) for name, _, _ in runs}
    print({name: f"{change:+.2%}" for name, change in changes.items()})
    if given.record:
        notes = (
            "Losses on held-out text in nats by step; perplexity_change is against the base at "
            "equal further tokens. Balance loss off in pre-gated runs."
        )
        results = {"losses": losses, "perplexity_change": changes}
        suffix = "-".join(given.runs or ())
        print(record.write("pregated", results, notes=notes, suffix=suffix))


if __name__ == "__main__":
    main()
