"""The state of one running request, and the limits that requests are checked against.

`RequestState` holds the tokens and text so far and tells the listener about them. `ModelLimits`
says how long requests may be and which token ids and texts the model accepts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerBase

from moefit.engine.api import (
    Event,
    FinishedEvent,
    FinishReason,
    Listener,
    PromptEvent,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from moefit.engine.detokenize import IncrementalDetokenizer
from moefit.engine.runners import RunnerInput
from moefit.engine.sampler import Sampler, check_sampling, logprobs_of
from moefit.engine.scheduler import ScheduledTokens
from moefit.errors import ConfigError, RequestTooLargeError, UnsupportedModelError
from moefit.serve.hf.generation_config import NOT_SUPPRESSED, Suppressed
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDecoding:
    """What an answer is read with. tokenizer None: it is tokens alone.

    ends: the tokens that end a text. continues: the answer goes on from the prompt's text; if not,
    it goes on from the token `start`. suppressed: tokens that no answer may have.
    """

    tokenizer: PreTrainedTokenizerBase | None
    ends: frozenset[int]
    continues: bool = True
    start: int | None = None
    suppressed: Suppressed = NOT_SUPPRESSED


class RequestState:
    """Prompt and answer of one request. ended: called with its name, before the last event."""

    def __init__(
        self,
        name: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        listener: Listener,
        ended: Callable[[str], None],
    ):
        self.name, self.sampling = name, sampling
        self.prompt, self.chooser = tuple(prompt), Sampler(sampling)
        self._listener, self._ended, self._tokens = listener, ended, list(prompt)
        self._text: IncrementalDetokenizer | None = None
        self._ends: frozenset[int] = frozenset()
        self._logprobs: list[TokenLogprob | None] = [None]
        self._came, self._waited = monotonic(), 0.0
        self.finished = False

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self._tokens) - len(self.prompt)

    def set_decoding(self, language: TextDecoding) -> None:
        """Turn tokens into text this way."""
        if language.tokenizer is not None:
            after = self.prompt if language.continues else ()
            self._text = IncrementalDetokenizer(language.tokenizer, self.sampling.stop, after=after)
        ends = frozenset() if self.sampling.ignore_eos else language.ends
        self._ends = ends | self.sampling.stop_ids
        begin = () if language.start is None else (language.start,)
        context = self.prompt if language.continues else begin
        self.chooser = Sampler(self.sampling, context=context, suppressed=language.suppressed)

    def begin(self) -> None:
        """It has a place from now on."""
        self._waited = monotonic() - self._came

    def work(self, piece: ScheduledTokens) -> RunnerInput:
        """A piece's tokens, and which logits it needs."""
        tokens = self._tokens[piece.start : piece.stop]
        reading = self.sampling.prompt_logprobs is not None and piece.start < len(self.prompt)
        wants = len(tokens) if reading else int(piece.last)
        return RunnerInput(request=self.name, tokens=tokens, past=piece.start, wants=wants)

    def read(self, piece: ScheduledTokens, logits_NV: Tensor) -> None:
        """That piece of the prompt has been read, with these logits of what was asked for."""
        if (top := self.sampling.prompt_logprobs) is not None:
            following = self.prompt[piece.start + 1 : piece.stop + 1]
            self._logprobs += logprobs_of(logits_NV[: len(following)], following, top)
        if piece.stop == len(self.prompt):
            told = None if self.sampling.prompt_logprobs is None else tuple(self._logprobs)
            self._notify(PromptEvent(logprobs=told, waited=self._waited))
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
        self._notify(TokenEvent(token=token, text=text, logprob=logprob))
        if ends or (self._text is not None and self._text.stopped):
            self.finish("stop")
        elif self.num_generated >= self.sampling.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, message: str = "") -> None:
        """The last event; after it nothing more is told."""
        if self.finished:
            return
        self.finished = True
        text, reason, message = self._rest(reason, message)
        self._ended(self.name)
        self._notify(
            FinishedEvent(
                reason=reason,
                prompt_tokens=len(self.prompt),
                completion_tokens=self.num_generated,
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

    def _notify(self, event: Event) -> None:
        try:
            self._listener(event)
        except BaseException:  # noqa: BLE001 - whatever a listener does, others are served
            _LOG.exception("the listener of request %s failed", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """model: its class. max_model_len: tokens of one request, prompt and answer. vocabulary: tokens
    that there are.
    """

    model: str
    max_model_len: int
    vocabulary: int
    language: TextDecoding

    def check(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raise ConfigError for what cannot be, RequestTooLargeError for what is too long."""
        check_sampling(sampling)
        if not prompt_ids:
            raise ConfigError("the prompt has no tokens; give at least one")
        if wrong := [token for token in prompt_ids if not 0 <= token < self.vocabulary]:
            raise ConfigError(
                f"token {wrong[0]} does not exist; the model's are 0 to {self.vocabulary - 1}"
            )
        if wrong := [token for token, _ in sampling.logit_bias if not 0 <= token < self.vocabulary]:
            raise ConfigError(
                f"logit_bias for token {wrong[0]}, which does not exist; the model's are 0 to "
                f"{self.vocabulary - 1}"
            )
        if sampling.stop and self.language.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and the model's folder has none")
        if sampling.prompt_logprobs is not None and not self.language.continues:
            raise ConfigError(
                f"{self.model} encodes its prompt and gives no log-probabilities of it; leave "
                "prompt_logprobs (echo) out"
            )
        wanted = len(prompt_ids) + sampling.max_tokens
        if wanted > self.max_model_len:
            room = self.max_model_len - len(prompt_ids)
            fewer = f"max_tokens={room} or less, or " if room > 0 else ""
            raise RequestTooLargeError(
                f"a prompt of {len(prompt_ids):,} tokens and an answer of up to "
                f"{sampling.max_tokens:,} are {wanted:,}, but one request holds at most "
                f"{self.max_model_len:,}; give {fewer}a shorter prompt"
            )


def limits_of(served: ServedModel, wanted: int | None, context: int) -> ModelLimits:
    """What this model can be asked. wanted: the tokens of one request, of `context` in all.

    Raises UnsupportedModelError for a model that does not go on token by token, ConfigError for a
    length that it has not.
    """
    model: Any = served.model
    if getattr(type(model), "generate", None) is not vars(GenerationMixin)["generate"]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not generate text token by token, as requests ask for; "
            "compute with the model itself (moefit.load)"
        )
    text = model.config.get_text_config(decoder=True)
    return ModelLimits(
        model=type(model).__name__,
        max_model_len=_longest(text, wanted, context),
        vocabulary=text.vocab_size,
        language=_text_decoding(served),
    )


def _longest(text_config: Any, wanted: int | None, context: int) -> int:
    own = getattr(text_config, "max_position_embeddings", None)
    most = min(context, own) if isinstance(own, int) and own > 0 else context
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"max_model_len={wanted:,}, but the model and the memory that was reserved hold "
            f"{most:,} tokens; load with a larger context, or give {most:,} or less"
        )
    return wanted or most


def _text_decoding(served: ServedModel) -> TextDecoding:
    model: Any = served.model
    ends = model.generation_config.eos_token_id
    try:
        tokenizer = served.tokenizer
    except ConfigError:
        tokenizer = None
    return TextDecoding(
        tokenizer=tokenizer,
        ends=frozenset([ends] if isinstance(ends, int) else ends or ()),
        continues=not model.config.is_encoder_decoder,
        start=served.generation.start,
        suppressed=served.generation.suppressed,
    )
