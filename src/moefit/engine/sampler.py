"""From logits to the next token of each request.

Owns greedy choice and sampling, penalties, and log-probabilities. Each request has a generator of
its own, so that its tokens do not depend on who shares the step. Knows nothing of texts.

The order is: penalties (of what the answer has so far), temperature, the top_k likeliest, of these
the fewest whose share reaches top_p. Log-probabilities are of the model itself, before all that.

Shapes: N rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from math import isfinite, isnan

import torch
from torch import Tensor

from moefit.engine.request import Sampling, TokenLogprob
from moefit.errors import ConfigError

NO_NUMBERS = "the model's logits are no finite numbers; another dtype may help"
_ROWS = 16  # of the vocabulary in float32 that are made at a time


def check_sampling(sampling: Sampling) -> None:
    """Raise ConfigError for a value that cannot be."""
    if sampling.max_tokens < 0:
        raise ConfigError(f"max_tokens={sampling.max_tokens}, but it counts tokens, 0 or more")
    if not 0 <= sampling.temperature < float("inf"):
        raise ConfigError(f"temperature={sampling.temperature}, but it is 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p}, but it is a share above 0, up to 1 (all)")
    if sampling.top_k < 0:
        raise ConfigError(f"top_k={sampling.top_k}, but it counts tokens, 0 for all")
    for name in ("presence_penalty", "frequency_penalty"):
        if not isfinite(value := getattr(sampling, name)):
            raise ConfigError(f"{name}={value}, but it is a finite number")
    for name in ("logprobs", "prompt_logprobs"):
        if (number := getattr(sampling, name)) is not None and number < 0:
            raise ConfigError(f"{name}={number}, but it counts tokens, 0 or more")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        raise ConfigError(f"seed={sampling.seed} does not fit 64 bits")


class Chooser:
    """How one request's tokens are chosen."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.temperature > 0:
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        sampling = self.sampling
        return sampling.temperature == 0 and not self._penalised and sampling.logprobs is None

    @property
    def _penalised(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def choose(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log-probability if asked for; logits in float32."""
        scores_V = self._with_penalties(logits_V)
        token = int(scores_V.argmax()) if self.sampling.temperature == 0 else self._drawn(scores_V)
        self._counts[token] += self._penalised
        if self.sampling.logprobs is None:
            return token, None
        return token, logprobs_of(logits_V[None], [token], self.sampling.logprobs)[0]

    def _with_penalties(self, logits_V: Tensor) -> Tensor:
        if not self._penalised or not self._counts:
            return logits_V
        ids = torch.tensor(list(self._counts), device=logits_V.device)
        counts = torch.tensor(list(self._counts.values()), device=logits_V.device)
        less = self.sampling.presence_penalty + self.sampling.frequency_penalty * counts
        return logits_V.index_add(0, ids, -less.to(logits_V.dtype))

    def _drawn(self, scores_V: Tensor) -> int:
        """One uniform number against the cumulated shares, so that rounding hardly matters."""
        sampling = self.sampling
        kept = sampling.top_k or len(scores_V)
        scores_V = scores_V.double()
        # Nothing is above 0 then, so that none grows beyond all numbers, however cold.
        scores_V = ((scores_V - scores_V.max()) / sampling.temperature).cpu()
        if kept < len(scores_V) or sampling.top_p < 1:
            scores_V, ids_V = scores_V.topk(min(kept, len(scores_V)))
        else:
            ids_V = torch.arange(len(scores_V))
        sums_V = scores_V.softmax(-1).cumsum(-1)
        if sampling.top_p < 1:  # the first whose sum reaches top_p is the last that is kept
            sums_V = sums_V[: int((sums_V < sampling.top_p).sum()) + 1]
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums_V[-1]
        index = int(torch.searchsorted(sums_V, drawn, right=True))
        return int(ids_V[min(index, len(sums_V) - 1)])


Choice = tuple[int, TokenLogprob | None]
"""A token, with its log-probability if asked for."""


def choose(logits_NV: Tensor, choosers: Sequence[Chooser]) -> list[Choice | None]:
    """The next token of each row; None where the largest of its logits is no finite number."""
    chosen: list[Choice | None] = []
    for begin in range(0, len(choosers), _ROWS):
        rows_NV = logits_NV[begin : begin + _ROWS].float()
        largest_N, likeliest_N = rows_NV.max(-1)  # what is no number is the largest
        some = zip(
            choosers[begin : begin + _ROWS],
            likeliest_N.tolist(),
            largest_N.isfinite().tolist(),
            rows_NV,
            strict=True,
        )
        chosen += [_chosen(*one) for one in some]
    return chosen


def _chosen(chooser: Chooser, likeliest: int, finite: bool, logits_V: Tensor) -> Choice | None:
    if not finite:
        return None
    return (likeliest, None) if chooser.plain else chooser.choose(logits_V)


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of a token in each row, and of the row's `top` likeliest.

    Raises FloatingPointError where one is no number. A token that can't be has minus infinity.
    """
    found: list[TokenLogprob] = []
    for begin in range(0, len(tokens), _ROWS):
        rows_NV = logits_NV[begin : begin + _ROWS].float().log_softmax(-1)
        ids_N = torch.tensor(tokens[begin : begin + _ROWS], device=rows_NV.device)
        own = rows_NV.gather(-1, ids_N[:, None])[:, 0].tolist()
        if any(map(isnan, own)):
            raise FloatingPointError(NO_NUMBERS)
        values_NK, ids_NK = rows_NV.topk(min(top, rows_NV.shape[-1]))
        found += [
            TokenLogprob(token=token, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(
                ids_N.tolist(), own, ids_NK.tolist(), values_NK.tolist(), strict=True
            )
        ]
    return found
