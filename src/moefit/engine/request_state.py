"""State of one running request, and the limits that requests are checked against.

`RequestState` holds the tokens and text generated so far and sends events to the listener.
`ModelLimits` holds the longest request and the token ids and parameters that the model supports.
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
    RequestStage,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from moefit.engine.detokenize import IncrementalDetokenizer
from moefit.engine.prefix.tree import Prefix
from moefit.engine.runners import RunnerInput
from moefit.engine.sampler import Sampler, check_sampling, logprobs_of
from moefit.engine.scheduler import ScheduledTokens
from moefit.errors import ConfigError, RequestTooLargeError, UnsupportedModelError
from moefit.serve.hf.generation_config import NOT_SUPPRESSED, Suppressed
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDecoding:
    """How tokens become text.

    Attributes:
        tokenizer: The model's tokenizer; None returns tokens without text.
        eos_ids: Token ids that end a completion.
        decoder_only: Whether the completion continues the prompt. If False, it begins after
            `start`.
        start: First token of an encoder-decoder model's output.
        suppressed: Token sequences that are never generated.
    """

    tokenizer: PreTrainedTokenizerBase | None
    eos_ids: frozenset[int]
    decoder_only: bool = True
    start: int | None = None
    suppressed: Suppressed = NOT_SUPPRESSED


class RequestState:
    """Prompt, completion and sampler of one request.

    Args:
        name: Request id.
        prompt: Prompt token ids.
        sampling: Sampling parameters.
        listener: Receives the events.
        ended: Called with `name` just before the last event.

    Attributes:
        label: Id by which logs name the request; need not be unique.
        reason: Why the request ended; None until then.
    """

    def __init__(
        self,
        name: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        decoding: TextDecoding,
        listener: Listener,
        ended: Callable[[str], None],
    ):
        self.label = name
        self.name, self.prompt, self.sampling = name, tuple(prompt), sampling
        self._listener, self._ended, self._tokens = listener, ended, list(prompt)
        self._text: IncrementalDetokenizer | None = None
        if decoding.tokenizer is not None:
            after = self.prompt if decoding.decoder_only else ()
            self._text = IncrementalDetokenizer(
                decoding.tokenizer, sampling.stop, after=after, visible=sampling.visible
            )
        eos_ids = frozenset() if sampling.ignore_eos else decoding.eos_ids
        self._stop_ids = eos_ids | sampling.stop_ids
        start = () if decoding.start is None else (decoding.start,)
        context = self.prompt if decoding.decoder_only else start
        self.sampler = Sampler(sampling, context=context, suppressed=decoding.suppressed)
        self._logprobs: list[TokenLogprob | None] = [None]
        self._arrival, self._queue_seconds = monotonic(), 0.0
        self._first_token: float | None = None
        self.reason: FinishReason | None = None
        self.finished = self.failed = False
        self.prefix: Prefix | None = None  # what it may reuse and leave to others
        self.cached_tokens = 0  # of the prompt, whose keys and values were reused
        self.bytes_read_before = 0  # by the model, until the request was admitted

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and completion so far."""
        return self._tokens

    @property
    def num_generated(self) -> int:
        """Number of generated tokens."""
        return len(self._tokens) - len(self.prompt)

    def mark_admitted(self) -> None:
        """Record the time at which the request was admitted."""
        self._queue_seconds = monotonic() - self._arrival

    def log_fields(self, **more: Any) -> dict[str, Any]:
        """Return `extra` of a log call about this request: its ids, and further fields."""
        return {"fields": {"request_id": self.label, "engine_request": self.name, **more}}

    def summary(self) -> dict[str, Any]:
        """Return how the request went, for logs: tokens, and times in seconds."""
        first = None if self._first_token is None else self._first_token - self._arrival
        return {
            "finish_reason": self.reason,
            "prompt_tokens": len(self.prompt),
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.num_generated,
            "queue_seconds": round(self._queue_seconds, 4),
            "first_token_seconds": None if first is None else round(first, 4),
            "seconds": round(monotonic() - self._arrival, 4),
        }

    @property
    def stage(self) -> RequestStage:
        """Whether the prompt of a running request is computed, or its answer."""
        return "answer" if self.num_generated else "prompt"

    @property
    def drafts_at_most(self) -> int:
        """Tokens that may be generated after the next one."""
        return max(0, self.sampling.max_tokens - self.num_generated - 1)

    def runner_input(self, chunk: ScheduledTokens, draft: Sequence[int] = ()) -> RunnerInput:
        """Return a chunk's tokens, with those drafted after it, and the number of logits it needs.

        Args:
            chunk: Tokens of the request.
            draft: Tokens that may follow the last one.
        """
        tokens = self._tokens[chunk.start : chunk.stop]
        needs_all = self.sampling.prompt_logprobs is not None and chunk.start < len(self.prompt)
        num_logits = len(tokens) if needs_all else int(chunk.last)
        return RunnerInput(
            request=self.name,
            tokens=[*tokens, *draft],
            past=chunk.start,
            num_logits=num_logits + len(draft),
        )

    def on_prompt_chunk(self, chunk: ScheduledTokens, logits_NV: Tensor) -> None:
        """Process the logits of a prompt chunk; sends `PromptEvent` after the last one."""
        if (top := self.sampling.prompt_logprobs) is not None:
            following = self.prompt[chunk.start + 1 : chunk.stop + 1]
            self._logprobs += logprobs_of(logits_NV[: len(following)], following, top)
        if chunk.stop == len(self.prompt):
            logprobs = None if self.sampling.prompt_logprobs is None else tuple(self._logprobs)
            self._notify(PromptEvent(logprobs=logprobs, waited=self._queue_seconds))
            self._logprobs = []
            if self.sampling.max_tokens == 0:
                self.finish("length")

    def append(self, token: int, logprob: TokenLogprob | None, *, more: bool = False) -> None:
        """Append a generated token and send it; finishes the request if it is the last one.

        Args:
            token: The token.
            logprob: Its log-probability, if it is wanted.
            more: Whether the sampler has chosen further tokens already, so that its grammar is
                ahead of this one.
        """
        self._tokens.append(token)
        if self._first_token is None:
            self._first_token = monotonic()
        is_eos = token in self._stop_ids
        text = ""
        if self._text is not None:
            text = self._text.end(token) if is_eos else self._text.push(token)
        self._notify(TokenEvent(token=token, text=text, logprob=logprob))
        complete = not more and self.sampler.complete
        if is_eos or complete or (self._text is not None and self._text.stopped):
            self.finish("stop")
        elif self.num_generated >= self.sampling.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, message: str = "", *, code: str = "") -> None:
        """Send the last event; later calls do nothing."""
        if self.finished:
            return
        self.finished = True
        text, reason, message = self._flush(reason, message)
        self.failed, self.reason = reason == "error", reason
        self._ended(self.name)
        self._notify(
            FinishedEvent(
                reason=reason,
                prompt_tokens=len(self.prompt),
                completion_tokens=self.num_generated,
                text=text,
                message=message,
                cached_tokens=self.cached_tokens,
                code=code,
            )
        )

    def _flush(self, reason: FinishReason, message: str) -> tuple[str, FinishReason, str]:
        """Return the remaining text with the final reason and message. Never raises."""
        if self._text is None:
            return "", reason, message
        try:
            text = self._text.finish()
        except BaseException as error:  # noqa: BLE001 - any error in a tokenizer
            if reason == "error":
                return "", reason, message
            _LOG.exception("the text of request %s failed", self.label, extra=self.log_fields())
            return "", "error", f"{type(error).__name__}: {error}"
        if self._text.stopped and reason == "length":
            reason = "stop"  # the text held back completes a stop text
        return text, reason, message

    def _notify(self, event: Event) -> None:
        try:
            self._listener(event)
        except BaseException:  # noqa: BLE001 - a listener's error must not affect other requests
            _LOG.exception("the listener of request %s failed", self.label, extra=self.log_fields())


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """The most tokens of a request's prompt and completion.

    Attributes:
        tokens: Their number.
        why: Why it is not larger; empty if the model's texts are no longer.
        remedy: Returns what would allow a number of tokens; may be empty.
    """

    tokens: int
    why: str = ""
    remedy: Callable[[int], str] = lambda wanted: ""

    def check(self, prompt: int, max_tokens: int) -> None:
        """Raise RequestTooLargeError if prompt and completion have more tokens."""
        wanted, available = prompt + max_tokens, self.tokens - prompt
        if wanted <= self.tokens:
            return
        why = f" ({self.why})" if self.why else ""
        fewer = f"max_tokens={available} or less, or " if available > 0 else ""
        remedy = self.remedy(wanted)
        other = f"; it would fit with {remedy}" if remedy else ""
        raise RequestTooLargeError(
            f"a prompt of {prompt:,} tokens and an answer of up to {max_tokens:,} are {wanted:,}, "
            f"but one request holds at most {self.tokens:,}{why}; use {fewer}a shorter prompt"
            f"{other}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model accepts.

    Attributes:
        model: Class name, for error messages.
        own: Tokens of its longest text; None if it is not known.
        vocabulary: Number of token ids.
        decoding: How tokens become text.
    """

    model: str
    own: int | None
    vocabulary: int
    decoding: TextDecoding

    def check(self, prompt_ids: Sequence[int], sampling: SamplingParams, longest: Longest) -> None:
        """Validate a request.

        Raises:
            ConfigError: If a parameter or token id is invalid.
            RequestTooLargeError: If prompt and completion are longer than `longest`.
        """
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
        if sampling.stop and self.decoding.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, but the model's folder has none")
        if sampling.prompt_logprobs is not None and not self.decoding.decoder_only:
            raise ConfigError(
                f"{self.model} is an encoder-decoder model without log-probabilities of its "
                "prompt; omit prompt_logprobs (echo)"
            )
        longest.check(len(prompt_ids), sampling.max_tokens)


def model_limits(served: ServedModel) -> ModelLimits:
    """Return the limits of a model.

    Raises:
        UnsupportedModelError: If the model does not generate token by token.
    """
    model: Any = served.model
    if getattr(type(model), "generate", None) is not vars(GenerationMixin)["generate"]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not generate text token by token, which requests need; "
            "call the model itself (moefit.load)"
        )
    text = model.config.get_text_config(decoder=True)
    own = getattr(text, "max_position_embeddings", None)
    return ModelLimits(
        model=type(model).__name__,
        own=own if isinstance(own, int) and own > 0 else None,
        vocabulary=text.vocab_size,
        decoding=_text_decoding(served),
    )


def eos_token_ids(served: ServedModel) -> frozenset[int]:
    """Return the token ids that end a completion."""
    model: Any = served.model
    eos_ids = model.generation_config.eos_token_id
    return frozenset([eos_ids] if isinstance(eos_ids, int) else eos_ids or ())


def _text_decoding(served: ServedModel) -> TextDecoding:
    model: Any = served.model
    try:
        tokenizer = served.tokenizer
    except ConfigError:
        tokenizer = None
    return TextDecoding(
        tokenizer=tokenizer,
        eos_ids=eos_token_ids(served),
        decoder_only=not model.config.is_encoder_decoder,
        start=served.generation.start,
        suppressed=served.generation.suppressed,
    )
