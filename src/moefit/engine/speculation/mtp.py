"""Drafts of the model's own layer for multi-token prediction.

`MtpDrafter` holds the hidden states that steps compute, the last ones of each request, until it
drafts. Then it runs the layer over those of the request's tokens, with the tokens that follow them,
and over its own output for each further token of a draft. The layer's keys and values lie in a pool
of their own, in the order in which they were computed; where states were dropped, keys are missing,
which makes guesses worse and changes no answer.

Shapes: T tokens, N requests, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefit.engine.kv_pool import KvPool
from moefit.engine.runners import Runner, RunnerInput, VarlenRunner
from moefit.engine.speculation.draft_model import next_tokens
from moefit.engine.speculation.drafts import (
    COMPUTED_EVIDENCE,
    Chooser,
    Draft,
    DraftedRequest,
)
from moefit.engine.varlen import Segment, VarlenCache, varlen_attention_enabled
from moefit.errors import UnsupportedModelError
from moefit.serve.hf.attention import WindowMask
from moefit.serve.hf.mtp import MTP_TOKENS, MtpLayer
from moefit.serve.memory.draft import DRAFT_STEP


@dataclass(slots=True)
class _Text:
    """What is known of a request.

    Attributes:
        foreseen: See `DraftedRequest`.
        states_TD: Hidden states that the layer has not been run over; None if there are none.
        first: Position of the first of them.
        kept: Keys in the pool that belong to the request's tokens.
    """

    foreseen: Callable[[], Chooser | None]
    states_TD: Tensor | None = None
    first: int = 0
    kept: int = 0

    def add(self, past: int, states_TD: Tensor) -> None:
        """Hold the states of tokens from position `past` on, in place of those known before."""
        if self.states_TD is not None and self.first < past <= self.first + len(self.states_TD):
            states_TD = torch.cat([self.states_TD[: past - self.first], states_TD])
            past = self.first
        drop = max(0, len(states_TD) - MTP_TOKENS)
        self.first, self.states_TD = past + drop, states_TD[drop:].clone()

    def ready(self, tokens: int) -> int:
        """Return how many states have a known next token, in a text of this many tokens."""
        return 0 if self.states_TD is None else min(len(self.states_TD), tokens - 1 - self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What the layer computes of one request.

    Attributes:
        request: Request id.
        states_TD: Hidden states.
        ids: The tokens after these.
        first: Position of the first state.
        past: Keys that it attends to besides its own.
        last: Whether the request's next token is wanted: no more rows follow.
    """

    request: str
    states_TD: Tensor
    ids: Sequence[int]
    first: int
    past: int
    last: bool = True


class MtpDrafter:
    """Drafts by the layer for multi-token prediction.

    Args:
        runner: That computes the engine's steps.
        places: Tokens of all requests together.
        longest: Tokens of the longest step that memory is reserved for; None for any. No call of
            the layer has more rows, or more than `DRAFT_STEP`.

    Raises:
        UnsupportedModelError: Requests are computed one at a time.
    """

    name = "the layer for multi-token prediction"
    computes = True

    def __init__(self, runner: Runner, places: int, longest: int | None = None):
        if not isinstance(runner, VarlenRunner):
            raise UnsupportedModelError(
                f"requests of {type(runner.model).__name__} are computed one at a time, with "
                "caches of their own, and nothing can be drafted for them; leave --speculate out"
            )
        self._model, self._layer = runner.model, MtpLayer(runner.model)
        self._most = DRAFT_STEP if longest is None else min(longest, DRAFT_STEP)
        self._cache = VarlenCache(KvPool(places))
        self._cache.gather = runner.cache.gather
        self._seen_TD: Tensor | None = None
        self._texts: dict[str, _Text] = {}
        self._choosers: dict[str, Chooser] = {}  # of the present call of `draft`
        self._unfollow: Callable[[], None] | None = None

    def open(self, request: str, about: DraftedRequest) -> None:
        """Reserve KV cache for a request, if there is room: it does not grow with the engine's."""
        if about.tokens > self._cache.pool.places.free:
            return
        self._cache.pool.open(request, about.tokens)
        self._texts[request] = _Text(about.foreseen)
        self._unfollow = self._unfollow or self._layer.follow(self._see)

    def close(self, request: str) -> None:
        """Free a request's KV cache; unknown ones are ignored."""
        if self._texts.pop(request, None) is not None:
            self._cache.pool.places.close(request)
        if not self._texts and self._unfollow is not None:
            self._unfollow()
            self._unfollow = self._seen_TD = None

    def behind(self, request: str, tokens: int) -> int | None:
        """Return how many states are to be computed first; None if the last one is not known."""
        text = self._texts.get(request)
        if text is None or text.ready(tokens) < 1 or text.first + text.ready(tokens) != tokens - 1:
            return None
        return text.ready(tokens)

    def computed(self, inputs: Sequence[RunnerInput]) -> None:
        """Hold the hidden states of a step that was computed."""
        if (seen_TD := self._seen_TD) is None:
            return
        self._seen_TD = None
        parts = seen_TD.split([len(one.tokens) for one in inputs])
        for one, states_TD in zip(inputs, parts, strict=True):
            if (text := self._texts.get(one.request)) is not None:
                text.add(one.past, states_TD)

    @torch.inference_mode()
    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        """Return continuations of requests whose last hidden state is known."""
        rows = [
            self._new_rows(name, tokens)
            for name, (tokens, most) in wanted.items()
            if most and self.behind(name, len(tokens)) is not None
        ]
        if not rows:
            return {}
        drafts: dict[str, list[int]] = {one.request: [] for one in rows}
        self._choosers = {
            name: chooser
            for name in drafts
            if (chooser := self._texts[name].foreseen()) is not None
        }
        ends = {one.request: one.first + len(one.ids) for one in rows}
        while rows:
            states, tokens = self._run_in_parts(rows)
            for name, token in tokens.items():
                drafts[name].append(token)
            rows = [
                _Rows(
                    request=one.request,
                    states_TD=states[one.request],
                    ids=drafts[one.request][-1:],
                    first=ends[one.request] + len(drafts[one.request]) - 1,
                    past=one.past + len(one.ids),
                )
                for one in rows
                if one.request in tokens and len(drafts[one.request]) < wanted[one.request][1]
            ]
        return {
            name: Draft(tokens=tuple(tokens), evidence=COMPUTED_EVIDENCE)
            for name, tokens in drafts.items()
        }

    def check(self) -> None:
        """Raise AssertionError if requests and their KV cache differ."""
        self._cache.pool.places.check()

    def _new_rows(self, request: str, tokens: Sequence[int]) -> _Rows:
        """Return what has to be computed of a request's tokens; it is then no longer held."""
        text = self._texts[request]
        number, states_TD = text.ready(len(tokens)), text.states_TD
        assert states_TD is not None
        rows = _Rows(
            request=request,
            states_TD=states_TD[:number],
            ids=tokens[text.first + 1 : text.first + 1 + number],
            first=text.first,
            past=text.kept,
        )
        text.kept += number
        text.states_TD = None
        return rows

    def _run_in_parts(self, rows: Sequence[_Rows]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return what `_run` does, with calls of the layer that memory is reserved for."""
        states: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        for part in _parts(rows, self._most):
            more_states, more_tokens = self._run(part)
            states |= more_states
            tokens |= more_tokens
        return states, tokens

    def _run(self, rows: Sequence[_Rows]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the last output [1, D] of requests, and the token that it predicts.

        Of requests of which more rows follow, nothing: their choosers must draw only once.
        """
        places, device = self._cache.pool.places, self._model.device
        segments = [
            Segment(start=places.start(one.request), past=one.past, new=len(one.ids))
            for one in rows
        ]
        plan = self._cache.begin(segments, sum(one.past + one.new for one in segments), device)
        ids = torch.tensor([token for one in rows for token in one.ids], device=device)
        positions = [at for one in rows for at in range(one.first, one.first + len(one.ids))]
        with varlen_attention_enabled(self._model):
            output_1TD = self._layer.hidden_1TD(
                torch.cat([one.states_TD for one in rows])[None],
                ids[None],
                torch.tensor([positions], device=device),
                attention_mask=WindowMask.of(None, device),
                past_key_values=self._cache,
                segments=plan,
            )
        names = [one.request for one in rows if one.last]
        if not names:
            return {}, {}
        whole = torch.tensor([one.last for one in rows])
        ends = (torch.tensor([len(one.ids) for one in rows]).cumsum(0) - 1)[whole]
        last_ND = output_1TD[0, ends.to(device)]
        states = dict(zip(names, last_ND.split(1), strict=True))
        return states, next_tokens(names, self._layer.logits(last_ND), self._choosers)

    def _see(self, states: Tensor) -> None:
        """Hold the hidden states of a forward pass, until `computed` divides them."""
        self._seen_TD = states.flatten(0, 1)


def _parts(rows: Sequence[_Rows], most: int) -> Iterator[list[_Rows]]:
    """Yield rows of requests in order, with at most this many states in each list."""
    part: list[_Rows] = []
    left = most
    for one in rows:
        begin = 0
        while begin < len(one.ids):
            end = min(begin + left, len(one.ids))
            part.append(
                replace(
                    one,
                    states_TD=one.states_TD[begin:end],
                    ids=one.ids[begin:end],
                    first=one.first + begin,
                    past=one.past + begin,
                    last=end == len(one.ids),
                )
            )
            left -= end - begin
            begin = end
            if not left:
                yield part
                part, left = [], most
    if part:
        yield part
