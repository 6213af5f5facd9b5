"""Quality of a served model, step by step, against the full model.

Owns decoding a text as a server would, one token at a time with its cache and its policy active,
and comparing every step with the same model computed exactly. One wide pass does not price a
policy of decoding, whose residents change from token to token; it is measured too, to be compared.
Works where the full model does not fit: the exact pass uses the same slots.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import DataError, UnsupportedModelError
from moefit.evaluate.perplexity import Text
from moefit.serve.hf.guards import refuse_no_numbers
from moefit.serve.model import ServedModel

Progress = Callable[[int, int], None]
"""Hears how many tokens of how many are done."""
_ROWS = 8  # of the vocabulary in float32 that are made at a time


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
        _window(served, window_L.to(served.model.device), prompt, against or served, sums)
        if progress is not None:
            progress(sums.tokens, total)
    return _summary(served, sums)


def _window(
    served: ServedModel, ids_L: Tensor, prompt: int, against: ServedModel, sums: _Sums
) -> None:
    """Add a window to the sums; at no time are logits of more than one pass over it in memory."""
    targets_T = ids_L[prompt + 1 :]
    with served.isolated(served.policy):
        sums.wide += _loss(_wide(served, ids_L, prompt), targets_T)
    full_TV = _full(against, ids_L, prompt)
    sums.full += _loss(full_TV, targets_T)
    read = served.report()["bytes_read"]
    for full_V, step_V, target in zip(
        full_TV, _steps(served, ids_L, prompt, sums), targets_T.tolist(), strict=True
    ):
        full_V = full_V.float().log_softmax(-1)
        sums.stepwise -= float(step_V[target])
        sums.divergence += float(F.kl_div(step_V, full_V, log_target=True, reduction="sum"))
        sums.agreed += int(full_V.argmax() == step_V.argmax())
    sums.bytes_read += served.report()["bytes_read"] - read
    sums.tokens += len(targets_T)
    sums.steps += len(ids_L) - 1


def _full(served: ServedModel, ids_L: Tensor, prompt: int) -> Tensor:
    """Exact, and leaving residents, scores and counters as they are: nobody shall learn from it."""
    with served.isolated(replace(served.policy, mode="exact", prefill="exact")):
        return _wide(served, ids_L.to(served.model.device), prompt).to(ids_L.device)


def _wide(served: ServedModel, ids_L: Tensor, prompt: int) -> Tensor:
    logits_TV = served.model(input_ids=ids_L[None, :-1], use_cache=False).logits[0, prompt:]
    refuse_no_numbers(logits_TV)
    return logits_TV


def _loss(logits_TV: Tensor, targets_T: Tensor) -> float:
    """The sum of losses, a few rows in float32 at a time: a vocabulary can be large."""
    rows = zip(logits_TV.split(_ROWS), targets_T.split(_ROWS), strict=True)
    return sum(
        float(F.nll_loss(some_TV.float().log_softmax(-1), targets, reduction="sum"))
        for some_TV, targets in rows
    )


def _steps(served: ServedModel, ids_L: Tensor, prompt: int, sums: _Sums) -> Iterator[Tensor]:
    """Log-probabilities of what follows each token behind the prompt; counts the seconds."""
    cache, inputs = None, [ids_L[None, :prompt]] if prompt else []
    inputs += [one_1[None] for one_1 in ids_L[prompt:-1].split(1)]
    for number, ids_1T in enumerate(inputs):
        began = time.perf_counter()
        output = served.model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        refuse_no_numbers(output.logits[0, -1])
        row_V = output.logits[0, -1].float().log_softmax(-1)
        sums.seconds += time.perf_counter() - began
        if number or not prompt:
            yield row_V


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
