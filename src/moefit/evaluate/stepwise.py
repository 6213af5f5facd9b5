"""Quality of a served model, step by step, against the full model.

Owns decoding a text as a server would, one token at a time with its cache and its policy active,
and comparing every step with the same model computed exactly. One wide pass does not price a
policy of decoding, whose residents change from token to token; it is measured too, to be compared.
Works where the full model does not fit: the exact pass uses the same slots.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import DataError, UnsupportedModelError
from moefit.evaluate.perplexity import Text
from moefit.serve.guards import refuse_no_numbers
from moefit.serve.served import ServedModel

Progress = Callable[[int, int], None]
"""Hears how many tokens of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """A served model against itself with all its experts, or against another one.

    Perplexities are over the same tokens: `full` exact, `wide` one pass a window under the policy
    of prefill, `stepwise` token by token. `divergence` is the mean KL(full || stepwise) in nats,
    `agreement` the share of steps whose likeliest token is the full model's.
    """

    mode: str
    prefill: str
    slots: int
    experts: int
    full: float
    wide: float
    stepwise: float
    divergence: float
    agreement: float
    substituted_mass: float
    hit_rate: float
    bytes_per_token: float
    tokens: int
    tokens_per_second: float

    @property
    def loss(self) -> float:
        """What the policy costs: stepwise over full perplexity, less one."""
        return self.stepwise / self.full - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "loss": self.loss}


@dataclass(slots=True)
class _Sums:
    full: float = 0.0
    wide: float = 0.0
    stepwise: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    bytes_read: int = 0


@torch.inference_mode()
def score_steps(
    served: ServedModel,
    text: Text,
    *,
    prompt: int = 16,
    against: ServedModel | None = None,
    progress: Progress | None = None,
) -> StepScore:
    """Score windows of a text; the first `prompt` tokens of each are prefilled, and not scored.

    The resident set goes on from window to window, as a server's does. against: what the full
    model's output is asked of, such as the same model at another precision; None is `served`.
    Raises DataError if no window is longer than the prompt, UnsupportedModelError for an
    encoder-decoder model, CheckpointError where the model computes no finite numbers.
    """
    if served.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(served.model).__name__} continues no text by itself; stepwise perplexity is "
            "for decoders"
        )
    windows = [window_L for ids_BL in text.batches() for window_L in ids_BL]
    windows = [window_L for window_L in windows if len(window_L) > prompt + 1]
    if not windows:
        raise DataError(
            f"no window of the text is longer than the {prompt + 1} tokens of the prompt; give "
            "more text or a longer context"
        )
    sums, total = _Sums(), sum(len(window_L) - 1 - prompt for window_L in windows)
    served.reset()
    for window_L in windows:
        full_TV = _full(against or served, window_L, prompt)
        _window(served, window_L.to(served.model.device), prompt, full_TV, sums)
        if progress is not None:
            progress(sums.tokens, total)
    return _summary(served, sums)


def _full(served: ServedModel, ids_L: Tensor, prompt: int) -> Tensor:
    """Exact, and leaving residents, scores and counters as they are: nobody shall learn from it."""
    with served.untouched(replace(served.policy, mode="exact", prefill="exact")):
        return _wide(served, ids_L.to(served.model.device), prompt)


def _window(served: ServedModel, ids_L: Tensor, prompt: int, full_TV: Tensor, sums: _Sums) -> None:
    targets_T = ids_L[prompt + 1 :]
    full_TV = full_TV.to(ids_L.device)
    policy = served.policy
    with served.untouched(policy):
        wide_TV = _wide(served, ids_L, prompt)
    read, began = served.report()["bytes_read"], time.perf_counter()
    step_TV = _steps(served, ids_L, prompt)
    sums.seconds += time.perf_counter() - began
    sums.bytes_read += served.report()["bytes_read"] - read
    sums.full += float(F.nll_loss(full_TV, targets_T, reduction="sum"))
    sums.wide += float(F.nll_loss(wide_TV, targets_T, reduction="sum"))
    sums.stepwise += float(F.nll_loss(step_TV, targets_T, reduction="sum"))
    sums.divergence += float(F.kl_div(step_TV, full_TV, log_target=True, reduction="sum"))
    sums.agreed += int((full_TV.argmax(-1) == step_TV.argmax(-1)).sum())
    sums.tokens += len(targets_T)
    sums.steps += len(ids_L) - 1


def _wide(served: ServedModel, ids_L: Tensor, prompt: int) -> Tensor:
    logits_TV = served.model(input_ids=ids_L[None, :-1], use_cache=False).logits[0, prompt:]
    refuse_no_numbers(logits_TV)
    return logits_TV.float().log_softmax(-1)


def _steps(served: ServedModel, ids_L: Tensor, prompt: int) -> Tensor:
    """Log-probabilities of what follows each token behind the prompt, [T, V]."""
    cache, rows = None, []
    inputs = [ids_L[None, :prompt]] if prompt else []
    inputs += [one_1[None] for one_1 in ids_L[prompt:-1].split(1)]
    for ids_1T in inputs:
        output = served.model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        refuse_no_numbers(output.logits[0, -1])
        rows.append(output.logits[0, -1].float().log_softmax(-1))
    return torch.stack(rows[1:] if prompt else rows)


def _summary(served: ServedModel, sums: _Sums) -> StepScore:
    report = served.report()
    return StepScore(
        mode=report["mode"],
        prefill=report["prefill"],
        slots=sum(report["slots"].values()),
        experts=sum(report["experts"].values()),
        full=math.exp(sums.full / sums.tokens),
        wide=math.exp(sums.wide / sums.tokens),
        stepwise=math.exp(sums.stepwise / sums.tokens),
        divergence=sums.divergence / sums.tokens,
        agreement=sums.agreed / sums.tokens,
        substituted_mass=report["substituted_mass"],
        hit_rate=report["hit_rate"],
        bytes_per_token=sums.bytes_read / sums.steps,
        tokens=sums.tokens,
        tokens_per_second=sums.steps / sums.seconds,
    )
