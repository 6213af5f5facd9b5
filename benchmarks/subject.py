"""A model and a text for benchmarks of quality: half of the windows are for calibration."""

import argparse
import math
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

import moefit
from moefit.api import folder_of
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.evaluate.perplexity import Text
from moefit.evaluate.stepwise import StepScore
from moefit.moe.routing import Rule
from moefit.serve.model import ServedModel


class Subject:
    """A model with its scored and calibration windows.

    Args:
        model: As on the command line.
        rule: Inference rule of a DS-MoE.
        arguments: With `text`, `tokens` and `context`.
        how: Settings for each loading.
    """

    def __init__(self, model: str, rule: str | None, arguments: argparse.Namespace, **how: Any):
        self.rule, self.context = rule and Rule.parse(rule), arguments.context
        self.folder, self._how = folder_of(model), {"context": self.context, **how}
        with self.load() as served:
            limit = 2 * arguments.tokens
            if arguments.text is None:
                text = held_out_text(served.tokenizer, self.context, limit)
            else:
                text = text_of_file(arguments.text, served.tokenizer, self.context, limit)
        windows = [window_L for ids_BL in text.batches() for window_L in ids_BL]
        self.scored, self.calibration = windows[::2], windows[1::2]

    def load(self, **settings: Any) -> ServedModel:
        """Load the model and set its rule."""
        served = moefit.load(self.folder, **{**self._how, **settings})
        if self.rule:
            assert isinstance(served.model, DsMoeForCausalLM), "only these can change their rule"
            served.model.set_inference_rule(self.rule)
        return served


def as_text(window_L: Tensor) -> Text:
    """Return one window as a text."""
    return Text(ids_T=window_L, text_bytes=1, context=len(window_L) - 1)


def summarised(scores: list[StepScore]) -> dict[str, Any]:
    """Combine windows of equal length, with the standard error of the paired difference."""
    costs = [math.log(one.stepwise / one.full) for one in scores]
    mean = {
        name: fmean(getattr(one, name) for one in scores)
        for name in ("divergence", "agreement", "substituted_mass", "hit_rate", "bytes_per_token")
    }
    return {
        "loss": math.exp(fmean(costs)) - 1,
        "error": stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan,
        "full": math.exp(fmean(math.log(one.full) for one in scores)),
        "stepwise": math.exp(fmean(math.log(one.stepwise) for one in scores)),
        **mean,
        "tokens_per_second": 1 / fmean(1 / one.tokens_per_second for one in scores),
        "tokens": sum(one.tokens for one in scores),
        "slots": scores[0].slots,
        "experts": scores[0].experts,
    }
