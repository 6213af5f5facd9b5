"""Measure configurations against the full model on a text.

`Reference` holds the text in windows of equal length and the full model's most likely tokens.
`Sample` holds one configuration's divergence, loss and speed.

Shapes: B sequences, T tokens, N most likely tokens, V vocabulary.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.engine.runners import start_token
from moefit.errors import DataError
from moefit.evaluate.decoding import Decoding
from moefit.evaluate.passage import read_pairs, read_text
from moefit.evaluate.perplexity import Text
from moefit.plan.configuration import Configuration, configuration_from
from moefit.serve.hf.guards import refuse_no_numbers
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows

TOP_TOKENS = 512
_MAX_LOGITS = 64 << 20  # bytes of float32 logits in one forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The full model's output on a text.

    Attributes:
        windows: Token ids; one more per window than the other tensors have positions.
        ids_BTN: The most likely next tokens.
        logp_BTN: Their log-probabilities.
        nll_BT: Loss of the actual next token, in nats.
    """

    windows: Windows
    ids_BTN: Tensor
    logp_BTN: Tensor
    nll_BT: Tensor

    def distance(self, logp_TV: Tensor, window: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Compare log-probabilities with the full model's.

        Args:
            logp_TV: Log-probabilities of consecutive positions.
            window: Index of the window.
            first: Position of the first row in the window.

        Returns:
            KL(full || this) in nats, T, and the loss in nats, T.
        """
        last = first + len(logp_TV)
        ids_TN = self.ids_BTN[window, first:last]
        full_TN = self.logp_BTN[window, first:last]
        other_TN = logp_TV.gather(-1, ids_TN.long())
        kl_T = (full_TN.exp() * (full_TN - other_TN)).sum(-1)
        if ids_TN.shape[-1] < logp_TV.shape[-1]:
            left_T, other_left_T = _remaining(full_TN), _remaining(other_TN)
            kl_T += left_T * (left_T.log() - other_left_T.log())
        targets_T = self.windows.ids_BT[window, first + 1 : last + 1]
        return kl_T, -logp_TV.gather(-1, targets_T[:, None])[:, 0]

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        part = path.with_name(f".{path.name}.part")
        tensors = {
            "windows": self.windows.ids_BT,
            "ids": self.ids_BTN,
            "logp": self.logp_BTN,
            "nll": self.nll_BT,
        }
        if self.windows.sources_BS is not None:
            tensors["sources"] = self.windows.sources_BS
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)


def read_reference(path: Path) -> Reference | None:
    """Read what `save` wrote; return None if the file is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            windows, ids, logp, nll = (
                torch.from_numpy(arrays[name]) for name in ("windows", "ids", "logp", "nll")
            )
            sources = torch.from_numpy(arrays["sources"]) if "sources" in arrays else None
    except Exception:  # noqa: BLE001 - BadZipFile, MemoryError, ...: numpy documents no list of exceptions
        return None
    found = Reference(windows=Windows(windows, sources), ids_BTN=ids, logp_BTN=logp, nll_BT=nll)
    return found if _is_sound(found) else None


def _is_sound(reference: Reference) -> bool:
    """Return whether shapes and dtypes are those of `make_reference`."""
    windows_BT, ids_BTN = reference.windows.ids_BT, reference.ids_BTN
    sources_BS = reference.windows.sources_BS
    dtypes = [one.dtype for one in (windows_BT, ids_BTN, reference.logp_BTN, reference.nll_BT)]
    if dtypes != [torch.int64, torch.int32, torch.float32, torch.float32] or windows_BT.dim() != 2:
        return False
    if sources_BS is not None and (
        sources_BS.dtype != torch.int64 or sources_BS.shape[:1] != windows_BT.shape[:1]
    ):
        return False
    followed = (windows_BT.shape[0], windows_BT.shape[1] - 1)
    return (
        ids_BTN.dim() == 3
        and ids_BTN.shape[:2] == followed
        and reference.logp_BTN.shape == ids_BTN.shape
        and reference.nll_BT.shape == followed
    )


def make_reference(served: ServedModel, windows: Windows) -> Reference:
    """Run windows through the model, which must be in exact mode."""
    ids, logp, nll = [], [], []
    for window, logp_TV in window_logprobs(served, windows):
        best_TN = logp_TV.topk(min(TOP_TOKENS, logp_TV.shape[-1]), dim=-1)
        ids.append(best_TN.indices.int())
        logp.append(best_TN.values)
        targets_T = windows.ids(window)[1:]
        nll.append(-logp_TV.gather(-1, targets_T[:, None])[:, 0])
    return Reference(
        windows=windows,
        ids_BTN=pad_sequence(ids, batch_first=True),
        logp_BTN=pad_sequence(logp, batch_first=True),
        nll_BT=pad_sequence(nll, batch_first=True),
    )


@torch.inference_mode()
def window_logprobs(served: ServedModel, windows: Windows) -> Iterator[tuple[int, Tensor]]:
    """Yield each window's index and log-probabilities [T, V]."""
    if windows.sources_BS is not None:  # of different lengths
        for row in range(len(windows)):
            logits_TV = served.model(
                **windows.inputs(row, served.model.device), use_cache=False
            ).logits[0]
            refuse_no_numbers(logits_TV)
            yield row, logits_TV.float().log_softmax(-1).cpu()
        return
    vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
    length = windows.ids_BT.shape[1] - 1
    at_once = max(1, _MAX_LOGITS // (4 * vocabulary * length))
    for first in range(0, len(windows), at_once):
        part_BT = windows.ids_BT[first : first + at_once, :-1].to(served.model.device)
        logits_BTV = served.model(input_ids=part_BT, use_cache=False).logits
        refuse_no_numbers(logits_BTV)
        for number, logits_TV in enumerate(logits_BTV):
            yield first + number, logits_TV.float().log_softmax(-1).cpu()


def _remaining(logp_TN: Tensor) -> Tensor:
    """Return the probability of all other tokens."""
    return (1 - logp_TN.exp().sum(-1)).clamp_min(1e-9)


MIN_WINDOWS = 4


def windows_of(text: Text) -> Windows:
    """Return windows of the text's context, spread over it.

    Raises:
        DataError: There are fewer than `MIN_WINDOWS`.
    """
    whole = (
        [
            window_T
            for batch_BT in text.batches()
            for window_T in batch_BT
            if len(window_T) == text.context + 1
        ]
        if len(text.ids_T) > 1
        else []
    )
    if len(whole) < MIN_WINDOWS:
        raise DataError(
            f"a text of {len(text.ids_T):,} tokens gives {len(whole)} windows of {text.context} "
            f"tokens, too few to calibrate on; give a text (and --tokens) of at least "
            f"{MIN_WINDOWS * text.context + 1:,} tokens, or a shorter --context"
        )
    return Windows(torch.stack(whole))


def read_windows(
    model: PreTrainedModel,
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int,
) -> Windows:
    """Return what a model is measured or calibrated on.

    Args:
        model: An encoder-decoder reads pairs, other models windows of a text.
        path: The file; None for the held-out standard library.
        tokenizer: The model's.
        context: Tokens per window; longer sources and targets are cut.
        max_tokens: Most tokens to predict.

    Raises:
        DataError: The file cannot be read, or gives fewer than `MIN_WINDOWS`.
    """
    if not model.config.is_encoder_decoder:
        return windows_of(read_text(path, tokenizer, context, max_tokens))
    windows = read_pairs(path, tokenizer, start_token(model), context, max_tokens)
    if len(windows) < MIN_WINDOWS:
        raise DataError(
            f"{path} gives {len(windows)} pairs of source and target, too few to calibrate on; "
            f"give a file (and --tokens) with {MIN_WINDOWS} or more"
        )
    return windows


RUN = 16  # tokens that a mean time is taken over


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The measurement of one configuration.

    Attributes:
        configuration: How the model was served.
        divergence: KL(full || this) in nats per token.
        loss: Loss in nats per token.
        full_loss: Loss of the full model on the same tokens.
        tokens: Number of tokens.
        seconds: Decoding time per token; None if whole windows were measured.
        misses: Experts that a token waited for, per block.
        moved: Share of router weight that was substituted, per block.
    """

    configuration: Configuration
    divergence: float
    loss: float
    full_loss: float
    tokens: int
    seconds: float | None = None
    misses: float = 0.0
    moved: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "configuration": self.configuration.as_dict()}


def sample_from(values: Mapping[str, Any]) -> Sample:
    """Return the sample that `as_dict` was called on."""
    return Sample(**{**values, "configuration": configuration_from(values["configuration"])})


def measure_windows(
    served: ServedModel, configuration: Configuration, reference: Reference
) -> Sample:
    """Measure quality over all windows of the reference, each in one forward pass."""
    kl = loss = full = 0.0
    tokens = 0
    for window, logp_TV in window_logprobs(served, reference.windows):
        kl_T, nll_T = reference.distance(logp_TV, window)
        kl, loss, tokens = kl + float(kl_T.sum()), loss + float(nll_T.sum()), tokens + len(kl_T)
        full += float(reference.nll_BT[window].sum())
    return Sample(
        configuration=configuration,
        divergence=kl / tokens,
        loss=loss / tokens,
        full_loss=full / tokens,
        tokens=tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Which tokens are decoded: number of windows, tokens of the prompt, tokens after it.

    An encoder-decoder has no prompt but its source, which is encoded before the first token.
    """

    windows: int
    prompt: int
    tokens: int


@torch.inference_mode()
def measure_steps(
    served: ServedModel, configuration: Configuration, reference: Reference, steps: Steps
) -> Sample:
    """Measure quality and speed token by token, after one window of warm-up.

    The resident experts stay from window to window.
    """
    kl: list[float] = []
    loss: list[float] = []
    full: list[float] = []
    seconds: list[float] = []
    _decode_steps(served, reference, 0, steps)
    served.reset()
    misses = 0
    numbers = [(1 + number) % len(reference.windows) for number in range(steps.windows)]
    encodes = reference.windows.sources_BS is not None
    for window in numbers:
        logp, times, fetched = _decode_steps(served, reference, window, steps)
        # The source's time is spread over the request's tokens.
        seconds += [statistics.fmean(times)] * len(times) if encodes else times
        misses += fetched
        kl_T, nll_T = reference.distance(torch.stack(logp), window, steps.prompt)
        kl += kl_T.tolist()
        loss += nll_T.tolist()
        full += reference.nll_BT[window, steps.prompt : steps.prompt + len(kl_T)].tolist()
    return Sample(
        configuration=configuration,
        divergence=statistics.fmean(kl),
        loss=statistics.fmean(loss),
        full_loss=statistics.fmean(full),
        tokens=len(kl),
        seconds=median_of_means(seconds),
        misses=misses / (len(seconds) * len(served.blocks)),
        moved=served.report()["substituted_mass"],
    )


def median_of_means(seconds: list[float]) -> float:
    """Return the median over runs of `RUN` tokens of a run's mean, which ignores short bursts."""
    runs = [seconds[first : first + RUN] for first in range(0, len(seconds), RUN)]
    whole = [run for run in runs if len(run) == RUN] or runs
    return statistics.median(statistics.fmean(run) for run in whole)


def _decode_steps(
    served: ServedModel, reference: Reference, window: int, steps: Steps
) -> tuple[list[torch.Tensor], list[float], int]:
    """Return log-probabilities and seconds of each step, and the number of fetched experts.

    The first step of an encoder-decoder includes its source.
    """
    ids_T, source_S = reference.windows.ids(window), reference.windows.source(window)
    last = min(steps.prompt + steps.tokens, len(ids_T) - 1)
    began, before = time.perf_counter(), served.report()["fetches"]
    decoding = Decoding(served, source_S)
    if source_S is None:
        decoding(ids_T[: steps.prompt])
        began, before = time.perf_counter(), served.report()["fetches"]
    rows, seconds = [], []
    for at in range(steps.prompt, last):
        rows.append(decoding(ids_T[at : at + 1])[-1].float().log_softmax(-1).cpu())
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    for row_V in rows:  # outside the timed part
        refuse_no_numbers(row_V)
    return rows, seconds, served.report()["fetches"] - before
