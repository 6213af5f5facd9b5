"""Quality of a served model while it decodes, compared with the full model.

A text is decoded token by token with KV cache and policy, as in serving, and each step is compared
with the model in exact mode. Perplexity of a single forward pass is measured too; it does not show
the cost of a policy whose resident experts change during decoding. The full model need not fit in
memory: exact mode uses the same slots.

Shapes: B sequences, L tokens of a window, T scored tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import DataError
from moefit.evaluate.decoding import Decoding
from moefit.evaluate.perplexity import Text
from moefit.serve.hf.guards import refuse_no_numbers
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows

Progress = Callable[[int, int], None]
"""Called with the number of tokens, done and in total."""
_ROWS = 8  # rows of logits converted to float32 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """Quality of a served model compared with the full model, over the same tokens.

    Attributes:
        mode: Policy of decoding.
        prefill: Policy of prefill.
        slots: Slots of all blocks.
        experts: Experts of all blocks.
        full: Perplexity of the full model.
        wide: Perplexity of one forward pass per window under the policy of prefill.
        stepwise: Perplexity of decoding token by token.
        divergence: Mean KL(full || stepwise) in nats.
        agreement: Fraction of steps with the same most likely token.
        substituted_mass: Router weight that went to other experts than the router's choice.
        hit_rate: Fraction of expert uses that found the expert resident.
        bytes_per_token: Read from storage.
        tokens: Scored tokens.
        tokens_per_second: Of decoding.
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
        """Relative increase of perplexity, stepwise over full."""
        return self.stepwise / self.full - 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
    text: Text | Windows,
    *,
    prompt: int = 16,
    reference: ServedModel | None = None,
    progress: Progress | None = None,
) -> StepScore:
    """Decode windows of a text and compare with the full model.

    Args:
        served: The model; its resident experts carry over from window to window.
        text: The text; for an encoder-decoder, pairs of sources and targets.
        prompt: Tokens at the start of each window that are prefilled and not scored. An
            encoder-decoder has none but its source.
        reference: The full model, such as one at another precision; None for `served`.
        progress: Called after each window.

    Raises:
        DataError: No window is longer than the prompt.
        CheckpointError: The model's output is not finite.
    """
    windows = list(_windows(text))
    prompt = 0 if windows and windows[0].source_S is not None else prompt
    windows = [one for one in windows if len(one.ids_L) > prompt + 1]
    if not windows:
        raise DataError(
            f"no window of the text is longer than the {prompt + 1} tokens of the prompt; give "
            "more text or a longer context"
        )
    sums, total = _Sums(), sum(len(one.ids_L) - 1 - prompt for one in windows)
    served.reset()
    for window in windows:
        _score_window(served, window, prompt, reference or served, sums)
        if progress is not None:
            progress(sums.tokens, total)
    return _summary(served, sums)


@dataclass(frozen=True, slots=True)
class _Window:
    """Ids of the decoder, and what an encoder reads, if there is one."""

    ids_L: Tensor
    source_S: Tensor | None


def _windows(text: Text | Windows) -> Iterator[_Window]:
    if isinstance(text, Text):
        yield from (_Window(window_L, None) for ids_BL in text.batches() for window_L in ids_BL)
        return
    yield from (_Window(text.ids(row), text.source(row)) for row in range(len(text)))


def _score_window(
    served: ServedModel, window: _Window, prompt: int, reference: ServedModel, sums: _Sums
) -> None:
    """Add a window to the sums, holding the logits of one pass at a time."""
    targets_T = window.ids_L[prompt + 1 :].to(served.model.device)
    with served.isolated(served.policy):
        sums.wide += _total_loss(_logits(served, window, prompt), targets_T)
    # In exact mode, without effects on resident experts, scores and counters.
    with reference.isolated(replace(reference.policy, mode="exact", prefill="exact")):
        full_TV = _logits(reference, window, prompt).to(targets_T.device)
    sums.full += _total_loss(full_TV, targets_T)
    read = served.report()["bytes_read"]
    for full_V, step_V, target in zip(
        full_TV, _decode(served, window, prompt, sums), targets_T.tolist(), strict=True
    ):
        full_V = full_V.float().log_softmax(-1)
        sums.stepwise -= float(step_V[target])
        sums.divergence += float(F.kl_div(step_V, full_V, log_target=True, reduction="sum"))
        sums.agreed += int(full_V.argmax() == step_V.argmax())
    sums.bytes_read += served.report()["bytes_read"] - read
    sums.tokens += len(targets_T)
    sums.steps += len(window.ids_L) - 1


def _logits(served: ServedModel, window: _Window, prompt: int) -> Tensor:
    row = Windows(window.ids_L[None], None if window.source_S is None else window.source_S[None])
    inputs = row.inputs(0, served.model.device)
    logits_TV = served.model(**inputs, use_cache=False).logits[0, prompt:]
    refuse_no_numbers(logits_TV)
    return logits_TV


def _total_loss(logits_TV: Tensor, targets_T: Tensor) -> float:
    """Return the summed loss, with few rows in float32 at a time because of large vocabularies."""
    rows = zip(logits_TV.split(_ROWS), targets_T.split(_ROWS), strict=True)
    return sum(
        float(F.nll_loss(some_TV.float().log_softmax(-1), targets, reduction="sum"))
        for some_TV, targets in rows
    )


def _decode(served: ServedModel, window: _Window, prompt: int, sums: _Sums) -> Iterator[Tensor]:
    """Yield the log-probabilities after each token following the prompt; add up the seconds."""
    began = time.perf_counter()
    decoding = Decoding(served, window.source_S)
    sums.seconds += time.perf_counter() - began
    inputs = [window.ids_L[:prompt]] if prompt else []
    for number, ids_T in enumerate([*inputs, *window.ids_L[prompt:-1].split(1)]):
        began = time.perf_counter()
        last_V = decoding(ids_T)[-1]
        refuse_no_numbers(last_V)
        row_V = last_V.float().log_softmax(-1)
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
