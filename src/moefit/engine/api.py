"""Public types of the engine: sampling parameters, events, settings and statistics.

Plain dataclasses without tensors. A request is submitted with `SamplingParams` and a listener,
which receives one `PromptEvent`, any number of `TokenEvent`s and one `FinishedEvent`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from time import monotonic
from typing import Literal, get_args

from moefit.engine.prefix.cache import PrefixStats
from moefit.engine.prefix.store import DiskStats
from moefit.engine.speculation.drafts import MAX_STEP_DRAFTS, SpeculateSetting, SpeculationStats
from moefit.engine.structured.grammar import Grammar
from moefit.errors import ConfigError

_RECENT = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Current load and totals of an engine.

    Attributes:
        running: Requests being processed.
        waiting: Requests in the queue.
        kv_tokens_used: Tokens of KV cache reserved by running requests.
        kv_tokens: Tokens that the KV cache holds.
        kv_tokens_reserved: Tokens that it holds from the start.
        kv_tokens_most: Tokens that it may hold in the budget in force.
        prompt_tokens_total: Prompt tokens processed since the engine was created.
        generation_tokens_total: Tokens generated since the engine was created.
        tokens_per_second: Generation throughput over the last five seconds.
        steps: Forward passes since the engine was created.
        runner: "packed" (variable-length batches) or "separate" (one request at a time).
        prefixes: Keys and values that requests may reuse; None if each has a cache of its own.
        prefix_files: Those in files; None without a folder.
        speculation: Drafted tokens; None where nothing is ever drafted.
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
    kv_tokens_reserved: int = 0
    kv_tokens_most: int = 0
    prefixes: PrefixStats | None = None
    prefix_files: DiskStats | None = None
    speculation: SpeculationStats | None = None


RequestStage = Literal["waiting", "prompt", "answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """How far one request is.

    Attributes:
        stage: Whether it is in the queue, its prompt is computed, or its answer.
        waits_for: What it waits for, in words; empty if each step computes some of it.
        computed_tokens: Tokens of prompt and answer that have been computed.
        cached_tokens: Those of the prompt that were reused.
        generated_tokens: Tokens of the answer so far.
    """

    stage: RequestStage
    waits_for: str
    computed_tokens: int
    cached_tokens: int
    generated_tokens: int


class TokenRate:
    """Count generated tokens, in total and per second over the last five seconds.

    Args:
        clock: Function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self.total = 0
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """Count tokens generated now."""
        self.total += tokens
        self._recent.append((self._clock(), tokens))
        self._forget()

    def per_second(self) -> float:
        """Return tokens per second over the last five seconds; 0 if there were none."""
        self._forget()
        if not self._recent:
            return 0.0
        seconds = max(self._clock() - self._recent[0][0], 0.5)
        return sum(made for _, made in self._recent) / seconds

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < self._clock() - _RECENT:
            self._recent.popleft()


ReuseSetting = Literal["auto", "on", "off"]
"""Whether keys and values of earlier prompts are reused; see `EngineSettings`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How requests share the model.

    Attributes:
        max_concurrency: Requests processed at the same time.
        max_model_len: Tokens of prompt and completion per request. None uses the model's own limit,
            bounded by the KV cache.
        context_max: Tokens to which the KV cache may grow for requests that need more than it has
            from the start, in memory that expert slots give up; the number that it has from the
            start keeps it as it is. None leaves experts half of what they have without that.
        prefill_chunk: Prompt tokens per step, so that decoding continues between chunks.
        max_waiting: Requests that may wait in the queue.
        deterministic: Compute requests one by one where they would otherwise change each other's
            answers, settle formats of experts before the first, and refuse modes in which answers
            depend on resident experts.
        prefix_cache: Whether keys and values of earlier prompts are reused: "auto" (where answers
            are the same bits as without), "on" (where it is possible) or "off".
        prefix_folder: Folder in which they survive a restart, if any.
        prefix_disk_bytes: Size of its files at most.
        speculate: Where drafts of several tokens come from that a step verifies at once: "ngram"
            (what followed the last tokens where they occurred before in the request), "draft"
            (what the draft model that was loaded says), "mtp" (what the model's layer for
            multi-token prediction says) or "off".
    """

    max_concurrency: int = 16
    max_model_len: int | None = None
    context_max: int | None = None
    prefill_chunk: int = 128
    max_waiting: int = 1024
    deterministic: bool = False
    prefix_cache: ReuseSetting = "auto"
    prefix_folder: Path | None = None
    prefix_disk_bytes: int = 8 << 30
    speculate: SpeculateSetting = "off"

    @property
    def logit_rows(self) -> int:
        """How many tokens of a step may have logits, besides those of prompts."""
        return self.max_concurrency + self.draft_rows

    @property
    def step_tokens(self) -> int:
        """How many tokens a step may compute, unless prompts must be computed whole."""
        return self.prefill_chunk + self.logit_rows

    @property
    def draft_rows(self) -> int:
        """How many drafted tokens a step may have."""
        return MAX_STEP_DRAFTS if self.speculate != "off" else 0

    def check(self) -> None:
        """Raise ConfigError if a value is out of range."""
        if self.prefix_cache not in get_args(ReuseSetting):
            known = ", ".join(get_args(ReuseSetting))
            raise ConfigError(f"prefix_cache={self.prefix_cache!r} is not one of {known}")
        if self.speculate not in get_args(SpeculateSetting):
            known = ", ".join(get_args(SpeculateSetting))
            raise ConfigError(f"speculate={self.speculate!r} is not one of {known}")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("max_model_len", "context_max"):
                continue
            if field.name in ("deterministic", "prefix_cache", "prefix_folder", "speculate"):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r}: must be a whole number, 1 or more")


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Sample from the smallest set of tokens whose probabilities add up to this; 0 is
            greedy, 1 keeps all.
        top_k: Sample from this many most probable tokens; 0 keeps all, 1 is greedy.
        min_p: Drop tokens below this fraction of the largest probability; 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in
            the prompt or completion; 1 changes nothing.
        presence_penalty: Subtracted once from the logit of each token in the completion.
        frequency_penalty: Subtracted for every occurrence of a token in the completion.
        logit_bias: Pairs of token id and value added to its logit.
        seed: Seed of the random generator; None uses a different one each time.
        stop: Texts that end the completion and are not part of it.
        stop_ids: Token ids that end the completion, besides the model's end-of-sequence tokens.
        ignore_eos: Do not stop at end-of-sequence tokens.
        logprobs: Number of most probable tokens to return with each generated token; 0 returns the
            chosen token's log-probability only, None returns nothing.
        prompt_logprobs: The same for each prompt token except the first.
        cache_salt: Only requests with the same salt reuse each other's keys and values.
        grammar: What the completion must match; it ends where nothing may follow. Texts and tokens
            that stop, and max_tokens, may end it earlier.
        visible: Special tokens whose text is part of the completion's.
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
    cache_salt: str = ""
    grammar: Grammar | None = None
    visible: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a token under the model, before temperature and penalties.

    Attributes:
        token: Token id.
        logprob: Its log-probability, in nats.
        top: Most probable tokens and their log-probabilities, in descending order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEvent:
    """The prompt has been processed.

    Attributes:
        waited: Seconds the request spent in the queue.
        logprobs: Log-probabilities of the prompt tokens if requested; None for the first token.
    """

    waited: float = 0.0
    logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """A generated token.

    Attributes:
        token: Token id.
        text: Text that became final with this token: complete characters that cannot belong to a
            stop text. Often empty.
        logprob: Log-probability of the token if requested.
    """

    token: int
    text: str = ""
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The last event of a request.

    Attributes:
        reason: Why the request ended.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens generated.
        text: Remaining text that was held back until now.
        message: Error message if `reason` is "error".
        cached_tokens: Tokens of the prompt whose keys and values were reused.
        code: Name of an error that the request itself caused; its message may be shown.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    message: str = ""
    cached_tokens: int = 0
    code: str = ""


Event = PromptEvent | TokenEvent | FinishedEvent
Listener = Callable[[Event], None]
"""Called in the engine's thread, in order; must not block. `FinishedEvent` is the last call."""
