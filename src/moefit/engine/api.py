"""What a request asks of the engine, and what it hears back.

Owns the records that pass between whoever serves people and the engine; plain Python, no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
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
class Prompt:
    """The prompt has been read; logprobs of its tokens, None for the first, if asked for.

    waited: seconds from the request's coming until it had a place.
    """

    waited: float = 0.0
    logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One more token of the answer, and the text that is certain with it: whole characters, no
    part of which may yet turn out to belong to a stop text. Often empty.
    """

    token: int
    text: str = ""
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of every request; text: what was held back and now is certain."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    message: str = ""


Event = Prompt | Token | Finished
Listener = Callable[[Event], None]
"""Called in the engine's thread, in order; must not block. After `Finished` nothing comes."""
