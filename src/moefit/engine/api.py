"""What callers of the engine use: sampling parameters, events, settings and statistics.

Plain records without tensors. A request is submitted with `Sampling` and a listener, which receives
a `Prompt` event, `Token` events and one `Finished`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from time import monotonic
from typing import Literal

from moefit.errors import ConfigError

_RECENT = 5.0  # seconds that the pace looks back


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and has done.

    kv_tokens: of the context; kv_tokens_used: reserved by requests that run. Totals count from the
    engine's beginning; tokens_per_second is of answers, over the last few seconds.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens: int
    prompt_tokens_total: int
    generation_tokens_total: int
    tokens_per_second: float
    steps: int
    runner: str


class TokenRate:
    """How many tokens have been made, in all and a second. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self.total = 0
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """So many more have been made just now."""
        self.total += tokens
        self._recent.append((self._clock(), tokens))
        self._forget()

    def per_second(self) -> float:
        """Tokens a second over the last few seconds; 0 if none was made in them."""
        self._forget()
        if not self._recent:
            return 0.0
        seconds = max(self._clock() - self._recent[0][0], 0.5)
        return sum(made for _, made in self._recent) / seconds

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < self._clock() - _RECENT:
            self._recent.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How requests share the model.

    max_concurrency: requests that run at once. max_model_len: prompt and answer of one request;
    None is the model's own, as far as the context's tokens go. prefill_chunk: tokens of prompts in
    one step, so that decoding goes on between. max_waiting: requests that may wait for a place.
    """

    max_concurrency: int = 16
    max_model_len: int | None = None
    prefill_chunk: int = 128
    max_waiting: int = 1024

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "max_model_len":
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r}, but it is a whole number, 1 or more")


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature 0 is greedy, and so are top_p 0 and top_k 1. top_k 0, top_p 1 and min_p 0 keep all
    tokens; min_p drops those whose share is below it times the largest. seed None: another each
    time.
    repetition_penalty: divides the positive logits of tokens that the prompt or the answer has, and
    multiplies their negative ones; 1 changes nothing. presence_penalty, frequency_penalty: are
    subtracted for tokens of the answer, once and for each time. logit_bias: (token, what is added
    to its logit).
    stop: texts that end the answer and are not part of it; stop_ids: tokens that do (the model's
    end-of-sequence tokens are added by the engine unless ignore_eos).
    logprobs: how many of the most probable tokens are told with each token; None tells none and
    0 the chosen one's alone. prompt_logprobs: the same for the prompt's tokens but the first.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability, of the model itself (before temperature and penalties).

    top: the most probable tokens with theirs, falling.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEvent:
    """The prompt has been read; logprobs of its tokens, None for the first, if asked for.

    waited: seconds from the request's coming until it had a place.
    """

    waited: float = 0.0
    logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One more token of the answer, and the text that is certain with it: whole characters, no
    part of which may yet turn out to belong to a stop text. Often empty.
    """

    token: int
    text: str = ""
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The last event of every request; text: what was held back and now is certain."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    message: str = ""


Event = PromptEvent | TokenEvent | FinishedEvent
Listener = Callable[[Event], None]
"""Called in the engine's thread, in order; must not block. After `Finished` nothing comes."""
