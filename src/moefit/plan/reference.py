"""One configuration, measured: how far from the full model, and how fast.

Owns the two ways of measuring. `measure_wide` runs windows as a whole, which prices precision and
is quick; `measure_steps` decodes them token by token, as a server does, which prices modes and
time.

Shapes: T tokens, V vocabulary.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moefit.plan.configuration import Configuration, configuration_from
from moefit.plan.reference import Reference, wide
from moefit.serve.guards import refuse_no_numbers
from moefit.serve.served import ServedModel

RUN = 16  # tokens of which a mean time is taken; of these means, the median


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was measured. Divergence and losses in nats a token; `seconds` a token, None if wide.

    misses and moved are means per token and block: experts that were waited for, and the share of
    router weight that went elsewhere.
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
        """Plain values, for JSON."""
        return {**asdict(self), "configuration": self.configuration.as_dict()}


def sample_from(values: Mapping[str, Any]) -> Sample:
    """From `as_dict`."""
    return Sample(**{**values, "configuration": configuration_from(values["configuration"])})


def measure_wide(served: ServedModel, configuration: Configuration, reference: Reference) -> Sample:
    """Over all windows of the reference."""
    kl = loss = full = 0.0
    tokens = 0
    for window, logp_TV in wide(served, reference.windows_BT):
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
    """Which tokens are decoded: of so many windows, behind a prompt; the first window warms up."""

    windows: int
    prompt: int
    tokens: int


@torch.inference_mode()
def measure_steps(
    served: ServedModel, configuration: Configuration, reference: Reference, steps: Steps
) -> Sample:
    """Token by token; what is in memory goes on from window to window."""
    kl: list[float] = []
    loss: list[float] = []
    full: list[float] = []
    seconds: list[float] = []
    _decode(served, reference, 0, steps)
    served.reset()
    misses = 0
    numbers = [(1 + number) % len(reference.windows_BT) for number in range(steps.windows)]
    for window in numbers:
        logp, times, fetched = _decode(served, reference, window, steps)
        seconds += times
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
        seconds=typical(seconds),
        misses=misses / (len(seconds) * len(served.blocks)),
        moved=served.report()["substituted_mass"],
    )


def typical(seconds: list[float]) -> float:
    """The median over runs of `RUN` tokens of a run's mean: bursts of other work don't count."""
    runs = [seconds[first : first + RUN] for first in range(0, len(seconds), RUN)]
    whole = [run for run in runs if len(run) == RUN] or runs
    return statistics.median(statistics.fmean(run) for run in whole)


def _decode(
    served: ServedModel, reference: Reference, window: int, steps: Steps
) -> tuple[list[torch.Tensor], list[float], int]:
    """Log-probabilities and seconds of each step, and how many experts were waited for."""
    ids_1T = reference.windows_BT[window][None].to(served.model.device)
    last = min(steps.prompt + steps.tokens, ids_1T.shape[1] - 1)
    output = served.model(input_ids=ids_1T[:, : steps.prompt], use_cache=True)
    cache, rows, seconds = output.past_key_values, [], []
    before = served.report()["fetches"]
    for at in range(steps.prompt, last):
        began = time.perf_counter()
        output = served.model(
            input_ids=ids_1T[:, at : at + 1], past_key_values=cache, use_cache=True
        )
        rows.append(output.logits[0, -1].float().log_softmax(-1).cpu())
        seconds.append(time.perf_counter() - began)
        cache = output.past_key_values
    for row_V in rows:  # not while the clock runs
        refuse_no_numbers(row_V)
    return rows, seconds, served.report()["fetches"] - before
