"""What an int8 KV cache costs in perplexity, and what other ways of rounding would.

    python benchmarks/kv_cache_quality.py [NAME=]MODEL... [--text FILE] [--tokens 16384]
        [--context 512] [--save NAME]

Two measurements on the same windows of held-out text. `stepwise`: the served model decodes token by
token with its cache in the model's dtype and in int8, against one pass without a cache. `ways`: the
full model in float32, in one pass whose keys and values are rounded as by each way, which is the
same as step by step up to float32 rounding; for the choice of a way.
"""

import argparse
import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from subject import Subject, as_text, summarised
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from moefit.cache_argument import forward_with_cache
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.stepwise import score_steps
from moefit.quant.kv_int8 import KV_CACHES

Rounding = Callable[[Tensor], Tensor]


def rounded(bits: int, group: int | None) -> Rounding:
    """Round to `bits` with a scale per token, head and `group` of values; None is the head."""

    def round_rows(rows_BGTC: Tensor) -> Tensor:
        parts = rows_BGTC.unflatten(-1, (-1, group or rows_BGTC.shape[-1]))
        scales = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((parts / scales).round() * scales).flatten(-2)

    return round_rows


def unrounded(rows: Tensor) -> Tensor:
    return rows


def in_bfloat16(rows: Tensor) -> Tensor:
    return rows.bfloat16().float()


HEAD = rounded(8, None)
WAYS: dict[str, tuple[Rounding, Rounding]] = {
    "bfloat16": (in_bfloat16, in_bfloat16),
    "int8, scale per head": (HEAD, HEAD),
    "int8, scale per head, keys only": (HEAD, unrounded),
    "int8, scale per head, values only": (unrounded, HEAD),
    "int8, scale per 32 values": (rounded(8, 32), rounded(8, 32)),
    "int6, scale per head": (rounded(6, None), rounded(6, None)),
    "int4, scale per 32 values": (rounded(4, 32), rounded(4, 32)),
}


class RoundingCache(DynamicCache):
    """Keys and values as they are after rounding."""

    def __init__(self, config: Any, keys: Rounding, values: Rounding):
        super().__init__(config=config)
        self._keys, self._values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> Any:
        pair = self._keys(key_states), self._values(value_states)
        return super().update(*pair, *rest, **named)


def stepwise(subject: Subject, kv_cache: str) -> dict[str, Any]:
    with subject.load(kv_cache=kv_cache) as served:
        scores = [score_steps(served, as_text(window_L)) for window_L in subject.scored]
    row = {"kv_cache": kv_cache, "losses": [math.log(one.stepwise) for one in scores]}
    row |= summarised(scores)
    del row["tokens_per_second"]  # other processes may have run
    return row


def compare_caches(subject: Subject) -> list[dict[str, Any]]:
    rows = [stepwise(subject, kv_cache) for kv_cache in KV_CACHES]
    own = rows[0]["losses"]
    for row in rows:
        row["against_model_cache"] = relative(row.pop("losses"), own)
    return rows


@torch.inference_mode()
def compare_ways(subject: Subject) -> list[dict[str, Any]]:
    model: Any = load_full_model(str(subject.folder), dtype=torch.float32)[0]
    losses: dict[str, list[float]] = {name: [] for name in ("none", *WAYS)}
    divergence: dict[str, float] = dict.fromkeys(WAYS, 0.0)
    for window_L in subject.scored:
        exact_TV = log_probabilities(model, window_L, unrounded, unrounded)
        losses["none"].append(float(F.nll_loss(exact_TV, window_L[1:])))
        for name, way in WAYS.items():
            rows_TV = log_probabilities(model, window_L, *way)
            losses[name].append(float(F.nll_loss(rows_TV, window_L[1:])))
            added = F.kl_div(rows_TV, exact_TV, log_target=True, reduction="batchmean")
            divergence[name] += float(added) / len(subject.scored)
    return [
        {"way": name, "divergence": divergence[name], **relative(losses[name], losses["none"])}
        for name in WAYS
    ]


def log_probabilities(model: Any, window_L: Tensor, keys: Rounding, values: Rounding) -> Tensor:
    cache = RoundingCache(model.config, keys, values)
    output, _ = forward_with_cache(model, cache, input_ids=window_L[None, :-1])
    return output.logits[0].log_softmax(-1)


def relative(losses: list[float], base: list[float]) -> dict[str, float]:
    """The relative increase of perplexity over windows, with its standard error."""
    costs = [one - other for one, other in zip(losses, base, strict=True)]
    error = stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
    return {"loss": math.expm1(fmean(costs)), "error": error}


def table(name: str, caches: list[dict[str, Any]], ways: list[dict[str, Any]]) -> Table:
    out = Table(title=name, title_justify="left")
    for column in ("cache", "loss", "error", "KL"):
        out.add_column(column, justify="left" if column == "cache" else "right")
    rows = [(f"{c['kv_cache']}, stepwise", c["against_model_cache"], c) for c in caches]
    rows += [(way["way"], way, way) for way in ways]
    for label, one, more in rows:
        figures = f"{one['loss']:+.3%}", f"{one['error']:.3%}", f"{more['divergence']:.1e}"
        out.add_row(label, *figures)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    results = {}
    for argument in arguments.models:
        name, _, model = argument.rpartition("=")
        subject = Subject(model, None, arguments)
        caches, ways = compare_caches(subject), compare_ways(subject)
        results[name or model] = {"stepwise": caches, "ways": ways}
        Console(width=100).print(table(name or model, caches, ways))
    if arguments.save:
        notes = (
            "stepwise.loss: perplexity token by token over that of one pass without a cache, less "
            "one; against_model_cache: over that token by token with a cache in the model's dtype; "
            "ways: float32, keys and values rounded, over not rounded; errors are standard errors "
            "of paired differences over windows; divergence in nats a token"
        )
        print(record.write("kv-cache-quality", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
