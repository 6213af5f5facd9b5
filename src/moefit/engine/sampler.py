"""From logits to the next token of each request.

Owns greedy choice and sampling, penalties, and log-probabilities. Each request has a generator of
its own, so that its tokens do not depend on who shares the step. Knows nothing of texts.

The order is that of transformers: logit_bias, repetition penalty, presence and frequency
penalties, suppressed tokens, temperature, the top_k likeliest, of these the fewest whose share
reaches top_p, of these the tokens whose share is at least min_p times the largest.
Log-probabilities are of the model itself, before all that.

Shapes: N rows, V vocabulary.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite, isnan, log

import torch
from torch import Tensor

from moefit.engine.api import SamplingParams, TokenLogprob
from moefit.errors import ConfigError
from moefit.serve.hf.generation_config import NOT_SUPPRESSED, Suppressed

NO_NUMBERS = "the model's logits are no finite numbers; another dtype may help"
MAX_BIAS = 100.0  # OpenAI's
REPETITION = (0.01, 100.0)  # beyond these, float32 loses its numbers
_ROWS, _ROWS_BYTES = 16, 1 << 20  # of the vocabulary in float32 that are made at a time, at most


def check_sampling(sampling: SamplingParams) -> None:
    """Raise ConfigError for a value that cannot be."""
    for name, (fits, wanted) in _FIELDS.items():
        value = getattr(sampling, name)
        if value is not None and not fits(value):
            raise ConfigError(f"{name}={value}, but {wanted}")
    for token, bias in sampling.logit_bias:
        if not abs(bias) <= MAX_BIAS:
            raise ConfigError(
                f"logit_bias={bias} for token {token}, but a bias is from {-MAX_BIAS:g} to "
                f"{MAX_BIAS:g}"
            )
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        raise ConfigError(f"seed={sampling.seed} does not fit 64 bits")


def _within(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


_COUNTS = _within(0, float("inf"))
_FIELDS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (_COUNTS, "it counts tokens, 0 or more"),
    "temperature": (lambda value: 0 <= value < float("inf"), "it is 0 (greedy) or above"),
    "top_p": (_within(0, 1), "it is a share, from 0 (greedy) to 1 (all)"),
    "top_k": (_COUNTS, "it counts tokens, 0 for all"),
    "min_p": (_within(0, 1), "it is a share, from 0 (all) to 1"),
    "repetition_penalty": (
        _within(*REPETITION),
        f"it is a factor from {REPETITION[0]:g} to {REPETITION[1]:g}; 1 changes nothing",
    ),
    "presence_penalty": (isfinite, "it is a finite number"),
    "frequency_penalty": (isfinite, "it is a finite number"),
    "logprobs": (_COUNTS, "it counts tokens, 0 or more"),
    "prompt_logprobs": (_COUNTS, "it counts tokens, 0 or more"),
}


class Sampler:
    """How one request's tokens are chosen.

    context: the tokens that stand before the answer, as the repetition penalty and suppressed
    sequences see them. suppressed: what the model's generation_config.json rules out.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        context: Sequence[int] = (),
        suppressed: Suppressed = NOT_SUPPRESSED,
    ):
        self.sampling, self._suppressed = sampling, suppressed
        self._greedy = sampling.temperature == 0 or sampling.top_p == 0 or sampling.top_k == 1
        self._counts: Counter[int] = Counter()
        self._seen = set(context) if self._repeats else set()
        self._seen_ids = torch.tensor(sorted(self._seen), dtype=torch.long)
        self._recent = deque(context, maxlen=suppressed.longest)
        self._begun = False
        self._generator = torch.Generator()
        if not self._greedy:
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return self._greedy and not self._changes and self.sampling.logprobs is None

    @property
    def _changes(self) -> bool:
        """Whether any logit is changed before a token is chosen."""
        return bool(
            self._penalised or self._repeats or self.sampling.logit_bias or self._suppressed
        )

    @property
    def _penalised(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    @property
    def _repeats(self) -> bool:
        return self.sampling.repetition_penalty != 1

    def choose(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log-probability if asked for; logits in float32.

        Raises FloatingPointError if no token is left to be chosen.
        """
        scores_V = self._changed(logits_V)
        if self._changes and not bool(scores_V.max().isfinite()):
            raise FloatingPointError(NO_NUMBERS)
        token = int(scores_V.argmax()) if self._greedy else self._drawn(scores_V)
        self._note(token)
        if self.sampling.logprobs is None:
            return token, None
        return token, logprobs_of(logits_V[None], [token], self.sampling.logprobs)[0]

    def _note(self, token: int) -> None:
        """Remember what later choices depend on."""
        self._begun = True
        self._counts[token] += self._penalised
        self._recent.append(token)
        if self._repeats and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = torch.cat([self._seen_ids, torch.tensor([token])])

    def _changed(self, logits_V: Tensor) -> Tensor:
        """Logits with biases, penalties and suppressed tokens; the given ones stay as they are."""
        sampling, scores_V = self.sampling, logits_V
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            scores_V = _added(scores_V, ids, torch.tensor(values))
        if self._repeats:
            scores_V = self._with_repetition(scores_V)
        if self._penalised and self._counts:
            counts = torch.tensor(list(self._counts.values()))
            less = sampling.presence_penalty + sampling.frequency_penalty * counts
            scores_V = _added(scores_V, self._counts, -less)
        if ruled_out := self._suppressed.now(self._recent, first=not self._begun):
            ids = torch.tensor(sorted(ruled_out), device=scores_V.device)
            scores_V = scores_V.index_fill(0, ids[ids < len(scores_V)], -torch.inf)
        return scores_V

    def _with_repetition(self, scores_V: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        ids = self._seen_ids.to(scores_V.device)
        ids = ids[ids < len(scores_V)]  # an embedding may have more rows than there are logits
        own = scores_V[ids]
        return scores_V.index_copy(0, ids, torch.where(own < 0, own * penalty, own / penalty))

    def _drawn(self, scores_V: Tensor) -> int:
        """One uniform number against the cumulated shares, so that rounding hardly matters."""
        sums_V, ids_V = self._kept(scores_V)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums_V[-1]
        index = int(torch.searchsorted(sums_V, drawn, right=True))
        return int(ids_V[min(index, len(sums_V) - 1)])

    def _kept(self, scores_V: Tensor) -> tuple[Tensor, Tensor]:
        """Cumulated shares of the tokens that may be drawn, and these tokens."""
        sampling = self.sampling
        kept = min(sampling.top_k or len(scores_V), len(scores_V))
        scores_V = scores_V.double()
        # Nothing is above 0 then, so that none grows beyond all numbers, however cold.
        scores_V = ((scores_V - scores_V.max()) / sampling.temperature).cpu()
        if kept < len(scores_V) or sampling.top_p < 1:
            scores_V, ids_V = scores_V.topk(kept)
        else:
            ids_V = torch.arange(len(scores_V))
        sums_V = scores_V.softmax(-1).cumsum(-1)
        if sampling.top_p < 1:  # the first whose sum reaches top_p is the last that is kept
            number = int((sums_V < sampling.top_p).sum()) + 1
            scores_V, ids_V, sums_V = scores_V[:number], ids_V[:number], sums_V[:number]
        if sampling.min_p > 0:  # the largest score is 0, so its share is exp(0) times as large
            likely = scores_V >= log(sampling.min_p)
            ids_V, sums_V = ids_V[likely], scores_V[likely].softmax(-1).cumsum(-1)
        return sums_V, ids_V


def _added(scores_V: Tensor, ids: Iterable[int], values: Tensor) -> Tensor:
    """Scores with these values added to those of these tokens."""
    place = torch.tensor(list(ids), device=scores_V.device)
    return scores_V.index_add(0, place, values.to(scores_V))


Choice = tuple[int, TokenLogprob | None]
"""A token, with its log-probability if asked for."""


def _rows_at_once(logits_NV: Tensor) -> int:
    """Return how many rows are taken to float32 together; one of 256,000 tokens is a MiB."""
    return max(1, min(_ROWS, _ROWS_BYTES // (4 * logits_NV.shape[-1])))


def sample(logits_NV: Tensor, choosers: Sequence[Sampler]) -> list[Choice | None]:
    """The next token of each row; None where the largest of its logits is no finite number."""
    chosen: list[Choice | None] = []
    step = _rows_at_once(logits_NV)
    for begin in range(0, len(choosers), step):
        rows_NV = logits_NV[begin : begin + step].float()
        largest_N, likeliest_N = rows_NV.max(-1)  # what is no number is the largest
        some = zip(
            choosers[begin : begin + step],
            likeliest_N.tolist(),
            largest_N.isfinite().tolist(),
            rows_NV,
            strict=True,
        )
        chosen += [_chosen(*one) for one in some]
    return chosen


def _chosen(chooser: Sampler, likeliest: int, finite: bool, logits_V: Tensor) -> Choice | None:
    if not finite:
        return None
    try:
        return (likeliest, None) if chooser.plain else chooser.choose(logits_V)
    except FloatingPointError:  # this request's alone; the others of the step go on
        return None


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of a token in each row, and of the row's `top` likeliest.

    Raises FloatingPointError where one is no number. A token that can't be has minus infinity.
    """
    found: list[TokenLogprob] = []
    step = _rows_at_once(logits_NV)
    for begin in range(0, len(tokens), step):
        rows_NV = logits_NV[begin : begin + step].float().log_softmax(-1)
        ids_N = torch.tensor(tokens[begin : begin + step], device=rows_NV.device)
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
