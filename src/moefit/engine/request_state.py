"""One request while it is served: its text so far, and what its listener hears.

Owns the tokens of prompt and answer, when the answer ends, and the order of events. Knows nothing
of other requests, of steps or of the model.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefit.engine.request import (
    Event,
    Finished,
    FinishReason,
    Listener,
    Prompt,
    Sampling,
    Token,
    TokenLogprob,
)
from moefit.engine.runners import Work
from moefit.engine.sampler import Chooser, logprobs_of
from moefit.engine.scheduler import Piece
from moefit.engine.text import TextStream
from moefit.serve.generation import NOT_SUPPRESSED, Suppressed

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """What an answer is read with. tokenizer None: it is tokens alone.

    ends: the tokens that end a text. continues: the answer goes on from the prompt's text; if not,
    it goes on from the token `start`. suppressed: tokens that no answer may have.
    """

    tokenizer: PreTrainedTokenizerBase | None
    ends: frozenset[int]
    continues: bool = True
    start: int | None = None
    suppressed: Suppressed = NOT_SUPPRESSED


class Answer:
    """Prompt and answer of one request. ended: called with its name, before the last event."""

    def __init__(
        self,
        name: str,
        prompt: Sequence[int],
        sampling: Sampling,
        listener: Listener,
        ended: Callable[[str], None],
    ):
        self.name, self.sampling = name, sampling
        self.prompt, self.chooser = tuple(prompt), Chooser(sampling)
        self._listener, self._ended, self._tokens = listener, ended, list(prompt)
        self._text: TextStream | None = None
        self._ends: frozenset[int] = frozenset()
        self._logprobs: list[TokenLogprob | None] = [None]
        self._came, self._waited = monotonic(), 0.0
        self.finished = False

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self._tokens) - len(self.prompt)

    def speak(self, language: Language) -> None:
        """Turn tokens into text this way."""
        if language.tokenizer is not None:
            after = self.prompt if language.continues else ()
            self._text = TextStream(language.tokenizer, self.sampling.stop, after=after)
        ends = frozenset() if self.sampling.ignore_eos else language.ends
        self._ends = ends | self.sampling.stop_ids
        begin = () if language.start is None else (language.start,)
        context = self.prompt if language.continues else begin
        self.chooser = Chooser(self.sampling, context=context, suppressed=language.suppressed)

    def begin(self) -> None:
        """It has a place from now on."""
        self._waited = monotonic() - self._came

    def work(self, piece: Piece) -> Work:
        """A piece's tokens, and which logits it needs."""
        tokens = self._tokens[piece.start : piece.stop]
        reading = self.sampling.prompt_logprobs is not None and piece.start < len(self.prompt)
        wants = len(tokens) if reading else int(piece.last)
        return Work(request=self.name, tokens=tokens, past=piece.start, wants=wants)

    def read(self, piece: Piece, logits_NV: Tensor) -> None:
        """That piece of the prompt has been read, with these logits of what was asked for."""
        if (top := self.sampling.prompt_logprobs) is not None:
            following = self.prompt[piece.start + 1 : piece.stop + 1]
            self._logprobs += logprobs_of(logits_NV[: len(following)], following, top)
        if piece.stop == len(self.prompt):
            told = None if self.sampling.prompt_logprobs is None else tuple(self._logprobs)
            self._tell(Prompt(logprobs=told, waited=self._waited))
            self._logprobs = []
            if self.sampling.max_tokens == 0:
                self.finish("length")

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """The answer has one more token; may end with it."""
        self._tokens.append(token)
        ends = token in self._ends
        text = ""
        if self._text is not None:
            text = self._text.end(token) if ends else self._text.push(token)
        self._tell(Token(token=token, text=text, logprob=logprob))
        if ends or (self._text is not None and self._text.stopped):
            self.finish("stop")
        elif self.made >= self.sampling.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, message: str = "") -> None:
        """The last event; after it nothing more is told."""
        if self.finished:
            return
        self.finished = True
        text, reason, message = self._rest(reason, message)
        self._ended(self.name)
        self._tell(
            Finished(
                reason=reason,
                prompt_tokens=len(self.prompt),
                completion_tokens=self.made,
                text=text,
                message=message,
            )
        )

    def _rest(self, reason: FinishReason, message: str) -> tuple[str, FinishReason, str]:
        """What was held back, and how the answer ends with it. An end comes in any case."""
        if self._text is None:
            return "", reason, message
        try:
            text = self._text.finish()
        except BaseException as error:  # noqa: BLE001 - whatever a tokenizer's code does
            if reason == "error":
                return "", reason, message
            _LOG.exception("the text of request %s failed", self.name)
            return "", "error", f"{type(error).__name__}: {error}"
        if self._text.stopped and reason == "length":
            reason = "stop"  # what was held back completed a stop text
        return text, reason, message

    def _tell(self, event: Event) -> None:
        try:
            self._listener(event)
        except BaseException:  # noqa: BLE001 - whatever a listener does, others are served
            _LOG.exception("the listener of request %s failed", self.name)
