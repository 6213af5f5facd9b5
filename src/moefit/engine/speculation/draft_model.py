"""Drafts of a smaller model with the same tokens.

`ModelDrafter` continues each request with a model of its own, as the request's sampler would, with
the random numbers that it will draw next. The model's keys and values lie in
a pool of the same number of tokens as the engine's. What was drafted and turned out to be wrong is
overwritten. A request that is far behind, such as one that begins, is read in several calls, and
drafts nothing until it has caught up.

Shapes: N requests, V vocabulary.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moefit.engine.runner_probe import choose_runner
from moefit.engine.runners import Runner, RunnerInput
from moefit.engine.speculation.drafts import (
    COMPUTED_EVIDENCE,
    Chooser,
    Draft,
    DraftedRequest,
)
from moefit.errors import UnsupportedModelError
from moefit.serve.memory.draft import DRAFT_STEP
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Text:
    """What a draft model has computed of a request.

    Attributes:
        foreseen: See `DraftedRequest`.
        tokens: Those with keys and values, of which the last ones may be wrong guesses.
        sure: How many of them are known to be the request's.
    """

    foreseen: Callable[[], Chooser | None]
    tokens: list[int] = field(default_factory=list[int])
    sure: int = 0

    def keep(self, text: Sequence[int]) -> int:
        """Drop what is not the beginning of the request's tokens; return what is left.

        The last token is dropped in any case, since its logits are wanted.
        """
        most = min(len(self.tokens), len(text) - 1)
        while self.sure < most and self.tokens[self.sure] == text[self.sure]:
            self.sure += 1
        self.sure = min(self.sure, most)
        del self.tokens[self.sure :]
        return self.sure


class ModelDrafter:
    """Drafts by a model.

    Args:
        model: The draft model.
        places: Tokens of all requests together.

    Raises:
        UnsupportedModelError: The model cannot draft several requests at once, or not take back
            what it has drafted.
    """

    computes = True

    def __init__(self, model: ServedModel, places: int):
        self.name = f"the draft model {model.folder.name}"
        self._model = model
        self._runner: Runner = choose_runner(model, places)
        if not self._runner.packs:
            raise UnsupportedModelError(
                f"{type(model.model).__name__} cannot be a draft model: what it has computed "
                "cannot be taken back when a guess was wrong; give a model with attention in all "
                "layers, or --speculate ngram"
            )
        config = model.model.config.get_text_config(decoder=True)
        self._vocabulary: int = config.vocab_size
        longest = getattr(config, "max_position_embeddings", None)
        self._longest = longest if isinstance(longest, int) and longest > 0 else places
        self._texts: dict[str, _Text] = {}
        self._choosers: dict[str, Chooser] = {}  # of the present call of `draft`

    def open(self, request: str, about: DraftedRequest) -> None:
        """Reserve KV cache for a request, unless it is longer than the draft model's texts.

        Nor is it where there is no room, since this KV cache does not grow with the engine's.
        """
        places = self._runner.prefixes
        if about.tokens > self._longest or places is None or about.tokens > places.free:
            return
        cached = self._runner.open(request, about.tokens, about.prefix)
        known = [] if about.prefix is None else list(about.prefix.tokens[:cached])
        self._texts[request] = _Text(about.foreseen, known, cached)

    def close(self, request: str) -> None:
        """Free a request's KV cache; unknown ones are ignored."""
        if self._texts.pop(request, None) is not None:
            self._runner.close(request)

    def behind(self, request: str, tokens: int) -> int | None:
        """Return how many of a request's tokens it has not read; None if it has no place for it."""
        text = self._texts.get(request)
        return None if text is None else max(0, tokens - text.sure)

    @torch.inference_mode()
    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        """Return continuations of the requests that it has read up to their last token."""
        self._choosers = {
            name: chooser
            for name in wanted
            if name in self._texts and (chooser := self._texts[name].foreseen()) is not None
        }
        drafts = self._read({name: tokens for name, (tokens, most) in wanted.items() if most})
        longest = max((wanted[name][1] for name in drafts), default=0)
        for place in range(1, longest):
            going_on = [
                name
                for name, tokens in drafts.items()
                if wanted[name][1] > place and len(tokens) == place  # fewer: its chooser failed
            ]
            if going_on:
                self._append(drafts, going_on)
        return {
            name: Draft(tokens=tuple(tokens), evidence=COMPUTED_EVIDENCE)
            for name, tokens in drafts.items()
        }

    def check(self) -> None:
        """Raise AssertionError if requests and their KV cache differ."""
        assert all(0 <= one.sure <= len(one.tokens) for one in self._texts.values())
        if self._runner.prefixes is not None:
            self._runner.prefixes.check()

    def _read(self, texts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Compute what is new in requests; return the next token of those then read."""
        inputs: list[RunnerInput] = []
        left = DRAFT_STEP
        for name, tokens in texts.items():
            if name not in self._texts or not left:
                continue
            past = self._texts[name].keep(tokens)
            new = tokens[past : past + left]
            if max(new) >= self._vocabulary:  # an id beyond those of the tokenizer
                continue
            left -= len(new)
            whole = past + len(new) == len(tokens)
            inputs.append(RunnerInput(request=name, tokens=new, past=past, num_logits=int(whole)))
        if not inputs:
            return {}
        found = self._step(inputs)
        for one in inputs:
            computed = one.past + len(one.tokens)
            self._texts[one.request].sure = computed
            self._runner.extend(one.request, texts[one.request], computed)
        return {name: [token] for name, token in found.items()}

    def _append(self, drafts: dict[str, list[int]], names: Sequence[str]) -> None:
        """Append the next token to these requests' drafts."""
        inputs = [
            RunnerInput(
                request=name,
                tokens=drafts[name][-1:],
                past=len(self._texts[name].tokens),
                num_logits=1,
            )
            for name in names
        ]
        for name, token in self._step(inputs).items():
            drafts[name].append(token)

    def _step(self, inputs: Sequence[RunnerInput]) -> dict[str, int]:
        """Compute tokens; return the next one of requests whose logits are wanted."""
        logits_NV = self._runner.step(inputs)
        for one in inputs:
            self._texts[one.request].tokens.extend(one.tokens)
        names = [one.request for one in inputs if one.num_logits]
        return next_tokens(names, logits_NV, self._choosers) if names else {}


def next_tokens(
    requests: Sequence[str], logits_NV: Tensor, choosers: Mapping[str, Chooser]
) -> dict[str, int]:
    """Return a token for each request: what its chooser says, else the likeliest.

    A request whose chooser fails has none, and the others are not affected.

    Args:
        requests: Their ids.
        logits_NV: A row for each.
        choosers: By request, where there are any.
    """
    found: dict[str, int] = {}
    likeliest = logits_NV.argmax(-1).tolist()
    for name, token, logits_V in zip(requests, likeliest, logits_NV, strict=True):
        try:
            found[name] = choosers[name](logits_V) if name in choosers else token
        except Exception as error:  # noqa: BLE001 - of one request, for which nothing is drafted
            _LOG.debug("no token is drafted for %s", name, exc_info=error)
    return found
