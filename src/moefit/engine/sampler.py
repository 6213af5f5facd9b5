"""Sample the next token of each request from its logits.

Greedy and random sampling, penalties and log-probabilities. Each request has its own random
generator, so that its tokens do not depend on the batch.

The order is that of transformers: logit_bias, repetition penalty, presence and frequency penalties,
suppressed tokens and those that the request's grammar forbids, temperature, top_k, top_p, min_p.
Log-probabilities are the model's own, before all of these.

Shapes: N rows, V vocabulary, K most probable tokens.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from math import isfinite, isnan, log

import torch
from torch import Tensor

from moefit.engine.api import SamplingParams, TokenLogprob
from moefit.engine.structured.grammar import GrammarError
from moefit.errors import ConfigError
from moefit.serve.hf.generation_config import NOT_SUPPRESSED, Suppressed

NOTHING_LEFT = (
    "the grammar allows only tokens that the model's generation_config.json or the request excludes"
)
NOT_FINITE = "the model's logits are not finite; try another dtype"
MAX_BIAS = 100.0  # OpenAI's
REPETITION = (0.01, 100.0)  # float32 overflows beyond these
_ROWS, _ROWS_BYTES = 16, 1 << 20  # limits of one float32 conversion


def check_sampling(sampling: SamplingParams) -> None:
    """Raise ConfigError if a sampling parameter is out of range."""
    for name, (is_valid, wanted) in _FIELDS.items():
        value = getattr(sampling, name)
        if value is not None and not is_valid(value):
            raise ConfigError(f"{name}={value}: must be {wanted}")
    for token, bias in sampling.logit_bias:
        if not abs(bias) <= MAX_BIAS:
            raise ConfigError(
                f"logit_bias={bias} for token {token}, but a bias must be from "
                f"{-MAX_BIAS:g} to {MAX_BIAS:g}"
            )
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        raise ConfigError(f"seed={sampling.seed} does not fit 64 bits")


def _is_between(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


_COUNTS = _is_between(0, float("inf"))
_FIELDS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (_COUNTS, "a number of tokens, 0 or more"),
    "temperature": (lambda value: 0 <= value < float("inf"), "0 (greedy) or positive and finite"),
    "top_p": (_is_between(0, 1), "from 0 (greedy) to 1 (all tokens)"),
    "top_k": (_COUNTS, "a number of tokens, or 0 for all"),
    "min_p": (_is_between(0, 1), "from 0 (all tokens) to 1"),
    "repetition_penalty": (
        _is_between(*REPETITION),
        f"from {REPETITION[0]:g} to {REPETITION[1]:g}; 1 changes nothing",
    ),
    "presence_penalty": (isfinite, "a finite number"),
    "frequency_penalty": (isfinite, "a finite number"),
    "logprobs": (_COUNTS, "a number of tokens, 0 or more"),
    "prompt_logprobs": (_COUNTS, "a number of tokens, 0 or more"),
}


class Sampler:
    """Choose the tokens of one request.

    Args:
        sampling: Sampling parameters.
        context: Tokens before the completion, for the repetition penalty and suppressed sequences.
        suppressed: Tokens that the model's generation_config.json excludes.

    Attributes:
        greedy: Whether the likeliest token is chosen, and no random number drawn.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        context: Sequence[int] = (),
        suppressed: Suppressed = NOT_SUPPRESSED,
    ):
        self.sampling, self._suppressed = sampling, suppressed
        self.greedy = sampling.temperature == 0 or sampling.top_p == 0 or sampling.top_k == 1
        self._counts: Counter[int] = Counter()
        self._seen = set(context) if self._has_repetition_penalty else set()
        self._seen_ids = torch.tensor(sorted(self._seen), dtype=torch.long)
        self._recent = deque(context, maxlen=suppressed.longest)
        self._started = False
        self._grammar = None if sampling.grammar is None else sampling.grammar.start()
        self._generator = torch.Generator()
        if not self.greedy:
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether the argmax of the logits is sufficient."""
        return self.greedy and not self._adjusts and self.sampling.logprobs is None

    @property
    def _adjusts(self) -> bool:
        """Whether any logit is changed before sampling."""
        return bool(
            self._penalizes
            or self._has_repetition_penalty
            or self.sampling.logit_bias
            or self._suppressed
            or self._grammar
        )

    @property
    def _penalizes(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    @property
    def _has_repetition_penalty(self) -> bool:
        return self.sampling.repetition_penalty != 1

    @property
    def complete(self) -> bool:
        """Whether the request's grammar lets nothing follow."""
        return self._grammar is not None and self._grammar.complete

    def choose(self, logits_V: Tensor) -> tuple[int, TokenLogprob | None]:
        """Return the next token and, if requested, its log-probability.

        Raises:
            FloatingPointError: If no token has a finite score.
            GrammarError: If the grammar allows none of the tokens that are not suppressed.
        """
        scores_V = self._adjusted(logits_V)
        if self._adjusts and not bool(scores_V.max().isfinite()):
            if self._grammar is not None and bool(logits_V.max().isfinite()):
                raise GrammarError(NOTHING_LEFT)
            raise FloatingPointError(NOT_FINITE)
        token = int(scores_V.argmax()) if self.greedy else self._draw(scores_V)
        self._record(token)
        if self.sampling.logprobs is None:
            return token, None
        return token, logprobs_of(logits_V[None], [token], self.sampling.logprobs)[0]

    def foreseen(self) -> Callable[[Tensor], int] | None:
        """Return what chooses from logits [V] as this sampler will, with the same random numbers.

        Its choices change nothing here, and it knows nothing of the grammar. None where the
        likeliest token is chosen.
        """
        if self.greedy and not self._adjusts:
            return None
        twin = copy(self)
        twin.sampling = replace(self.sampling, grammar=None, logprobs=None)
        twin._counts, twin._seen = self._counts.copy(), set(self._seen)
        twin._recent, twin._grammar = self._recent.copy(), None
        twin._generator = self._generator.clone_state()
        return lambda logits_V: twin.choose(logits_V.float())[0]

    def _record(self, token: int) -> None:
        """Update the state that later choices depend on."""
        self._started = True
        self._counts[token] += self._penalizes
        self._recent.append(token)
        if self._grammar is not None:
            self._grammar.accept(token)
        if self._has_repetition_penalty and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = torch.cat([self._seen_ids, torch.tensor([token])])

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """Return logits with biases, penalties and suppressed tokens applied to a copy."""
        sampling, scores_V = self.sampling, logits_V
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            scores_V = _add_at(scores_V, ids, torch.tensor(values))
        if self._has_repetition_penalty:
            scores_V = self._penalize_repetition(scores_V)
        if self._penalizes and self._counts:
            counts = torch.tensor(list(self._counts.values()))
            less = sampling.presence_penalty + sampling.frequency_penalty * counts
            scores_V = _add_at(scores_V, self._counts, -less)
        if ruled_out := self._suppressed.now(self._recent, first=not self._started):
            ids = torch.tensor(sorted(ruled_out), device=scores_V.device)
            scores_V = scores_V.index_fill(0, ids[ids < len(scores_V)], -torch.inf)
        if self._grammar is not None:  # last, since biases and penalties must not lift what it bars
            mask_V = torch.from_numpy(self._grammar.allowed(len(scores_V)))
            scores_V = scores_V.masked_fill(~mask_V.to(scores_V.device), -torch.inf)
        return scores_V

    def _penalize_repetition(self, scores_V: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        ids = self._seen_ids.to(scores_V.device)
        ids = ids[ids < len(scores_V)]  # an embedding may have more rows than the head
        own = scores_V[ids]
        return scores_V.index_copy(0, ids, torch.where(own < 0, own * penalty, own / penalty))

    def _draw(self, scores_V: Tensor) -> int:
        """Draw a token by inverting the cumulative distribution in float64, to limit rounding."""
        sums_V, ids_V = self._candidates(scores_V)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums_V[-1]
        index = int(torch.searchsorted(sums_V, drawn, right=True))
        return int(ids_V[min(index, len(sums_V) - 1)])

    def _candidates(self, scores_V: Tensor) -> tuple[Tensor, Tensor]:
        """Return cumulative probabilities of the tokens that may be drawn, and their ids."""
        sampling = self.sampling
        kept = min(sampling.top_k or len(scores_V), len(scores_V))
        scores_V = scores_V.double()
        # Subtract the maximum first, so that no temperature, however low, overflows.
        scores_V = ((scores_V - scores_V.max()) / sampling.temperature).cpu()
        if kept < len(scores_V) or sampling.top_p < 1:
            scores_V, ids_V = scores_V.topk(kept)
        else:
            ids_V = torch.arange(len(scores_V))
        sums_V = scores_V.softmax(-1).cumsum(-1)
        if sampling.top_p < 1:  # keep up to the first token that reaches top_p
            number = int((sums_V < sampling.top_p).sum()) + 1
            scores_V, ids_V, sums_V = scores_V[:number], ids_V[:number], sums_V[:number]
        if sampling.min_p > 0:  # the largest score is 0, its weight exp(0)
            likely = scores_V >= log(sampling.min_p)
            ids_V, sums_V = ids_V[likely], scores_V[likely].softmax(-1).cumsum(-1)
        return sums_V, ids_V


def _add_at(scores_V: Tensor, ids: Iterable[int], values: Tensor) -> Tensor:
    """Return scores with values added at these token ids, of those that have one.

    An embedding may have more rows than the head, and the served model more than a draft model.
    """
    place, values = torch.tensor(list(ids), device=scores_V.device), values.to(scores_V)
    known = place < len(scores_V)
    return scores_V.index_add(0, place[known], values[known])


Choice = tuple[int, TokenLogprob | None]
"""A token, and its log-probability if requested."""


def _chunk_rows(logits_NV: Tensor) -> int:
    """Return how many rows to convert to float32 at once; one of 256,000 tokens takes 1 MiB."""
    return max(1, min(_ROWS, _ROWS_BYTES // (4 * logits_NV.shape[-1])))


Failure = FloatingPointError | GrammarError
"""Why a request has no next token."""


def sample(logits_NV: Tensor, samplers: Sequence[Sampler]) -> list[Choice | Failure]:
    """Return the next token of each row, or why it has none.

    Args:
        logits_NV: Logits of the model, one row per request.
        samplers: Sampler of each row.
    """
    return [chosen[0] for chosen in sample_drafts(logits_NV, [(one, ()) for one in samplers])]


def sample_drafts(
    logits_NV: Tensor, runs: Sequence[tuple[Sampler, Sequence[int]]]
) -> list[list[Choice | Failure]]:
    """Return the next tokens of each request, or why it has none.

    A row is sampled only if its draft was right so far, so that a sampler chooses the same tokens,
    with the same random numbers, as one token at a time.

    Args:
        logits_NV: Logits of the model: of each request one row more than it has drafted tokens.
        runs: Sampler of each request, and the tokens that were drafted.

    Returns:
        For each request the drafted tokens that were right and the one that follows them; a failure
            is the last.
    """
    chosen: list[list[Choice | Failure]] = [[] for _ in runs]
    owners = [number for number, (_, draft) in enumerate(runs) for _ in range(len(draft) + 1)]
    step = _chunk_rows(logits_NV)
    for begin in range(0, len(owners), step):
        rows_NV = logits_NV[begin : begin + step].float()
        largest_N, likeliest_N = rows_NV.max(-1)  # NaN compares as the largest
        some = zip(
            owners[begin : begin + step],
            likeliest_N.tolist(),
            largest_N.isfinite().tolist(),
            rows_NV,
            strict=True,
        )
        for owner, likeliest, finite, logits_V in some:
            sampler, draft = runs[owner]
            if _continues(sampler, draft, chosen[owner]):
                chosen[owner].append(_choose(sampler, likeliest, finite, logits_V))
    return chosen


def _continues(sampler: Sampler, draft: Sequence[int], chosen: Sequence[Choice | Failure]) -> bool:
    """Return whether the tokens so far are the draft's, and others may follow."""
    if not chosen:
        return True
    last, place = chosen[-1], len(chosen) - 1
    if isinstance(last, Exception) or last[0] != draft[place]:
        return False
    return not sampler.complete


def _choose(sampler: Sampler, likeliest: int, finite: bool, logits_V: Tensor) -> Choice | Failure:
    if not finite:
        return FloatingPointError(NOT_FINITE)
    try:
        return (likeliest, None) if sampler.plain else sampler.choose(logits_V)
    except (FloatingPointError, GrammarError) as error:  # fails this request only
        return error


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of a token in each row, with the row's `top` most probable ones.

    Args:
        logits_NV: Logits of the model.
        tokens: Token id of each row.
        top: Number of most probable tokens; 0 returns none.

    Returns:
        One `TokenLogprob` per row; minus infinity for a token of probability 0.

    Raises:
        FloatingPointError: If a log-probability is NaN.
    """
    found: list[TokenLogprob] = []
    step = _chunk_rows(logits_NV)
    for begin in range(0, len(tokens), step):
        rows_NV = logits_NV[begin : begin + step].float().log_softmax(-1)
        ids_N = torch.tensor(tokens[begin : begin + step], device=rows_NV.device)
        own = rows_NV.gather(-1, ids_N[:, None])[:, 0].tolist()
        if any(map(isnan, own)):
            raise FloatingPointError(NOT_FINITE)
        values_NK, ids_NK = rows_NV.topk(min(top, rows_NV.shape[-1]))
        found += [
            TokenLogprob(token=token, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(
                ids_N.tolist(), own, ids_NK.tolist(), values_NK.tolist(), strict=True
            )
        ]
    return found
