"""What all endpoints share: the engine, the words, the instruments, and what one request may ask.

Owns the way from a request to `Sampling`, and whether the server still takes any. Knows nothing of
the shape of answers.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import time
from typing import TypeVar
from uuid import uuid4

import moefit
from moefit.engine.engine import Engine
from moefit.engine.request import Sampling
from moefit.errors import ConfigError
from moefit.server.asked import Generation
from moefit.server.live_plan import LivePlan
from moefit.server.metrics import ModelCollector
from moefit.server.refusal import Refused
from moefit.server.settings import ServerSettings
from moefit.server.telemetry import Telemetry
from moefit.server.vocabulary import Vocabulary, is_unicode

T = TypeVar("T")
FINGERPRINT = f"moefit-{moefit.__version__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One answer that is wanted."""

    prompt: Sequence[int]
    sampling: Sampling

    def told(self, longest: int) -> int:
        """Log-probabilities that may have to be kept until it ends, after `longest` tokens."""
        asked, most = self.sampling, min(self.sampling.max_tokens, longest)
        answer = 0 if asked.logprobs is None else most * (1 + asked.logprobs)
        prompt = 0
        if asked.prompt_logprobs is not None:
            prompt = len(self.prompt) * (1 + asked.prompt_logprobs)
        return answer + prompt


class Service:
    """One model behind one address. `draining`: what runs is finished, nothing new is taken."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        self.engine, self.settings, self.created = engine, settings, int(time())
        model = engine.served.model
        text = model.config.get_text_config(decoder=True)
        try:
            tokenizer = engine.served.tokenizer
        except ConfigError:
            tokenizer = None
        self.continues = not model.config.is_encoder_decoder
        self.words = Vocabulary(tokenizer, size=text.vocab_size, most=engine.max_model_len)
        self.telemetry = Telemetry(settings.name)
        self.telemetry.registry.register(
            ModelCollector(settings.name, engine.stats, engine.served.report)
        )
        self.draining = False
        self.live_plan: LivePlan | None = None  # of a server that was planned for its budget
        # Few threads: each has a heap of its own, and all of it is in the budget.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="moefit-http")
        self._operators = ThreadPoolExecutor(2, thread_name_prefix="moefit-operator")

    async def aside(self, work: Callable[..., T], *arguments: object) -> T:
        """Do what takes long without holding others up."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)

    async def operate(self, work: Callable[..., T], *arguments: object) -> T:
        """As `aside`, for what an operator asks for: no request's text can hold it up."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._operators, work, *arguments)

    def close(self, *, wait: bool = False) -> None:
        """Stop the threads, and the process that renders conversations.

        Args:
            wait: Return only when what the threads are doing has ended.
        """
        self.words.close()
        for threads in (self._threads, self._operators):
            threads.shutdown(wait=wait, cancel_futures=True)

    def now(self) -> int:
        """The time as answers have it."""
        return int(time())

    def problems(self) -> list[str]:
        """Return what is wrong although requests are served, in sentences."""
        if not self.engine.served.loads_failing:
            return []
        return [
            "experts cannot be read from storage: answers may use other experts than the router "
            "chose, or fail; the server's log says why"
        ]

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name."""
        if name is not None and name != self.settings.name:
            raise Refused(
                404,
                f"there is no model of that name here; there is {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Refuse while the server is shutting down."""
        if self.engine.failure is not None:
            raise Refused(
                503,
                "the engine has failed and the server must be started again; its log says why",
                code="engine_failed",
            )
        if self.draining:
            raise Refused(503, "the server is shutting down", code="shutting_down")

    def check_answers(self, asked: Generation, prompts: int) -> int:
        """n, if n answers to each prompt are no more than may be."""
        n = asked.n or 1
        if n * prompts > self.settings.answers:
            raise Refused(
                400,
                f"n={n} times the prompts, {prompts}, are {n * prompts} answers, but one request "
                f"may ask for {self.settings.answers}",
                param="n",
                code="too_many_answers",
            )
        if asked.stream_options and asked.stream_options.include_usage and not asked.stream:
            raise Refused(400, "stream_options is for stream=true alone", param="stream_options")
        return n

    def check_told(self, wishes: Sequence[Wish]) -> None:
        """Refuse more log-probabilities in one answer than there is memory meant for."""
        told = sum(wish.told(self.engine.max_model_len) for wish in wishes)
        if told > self.settings.logprobs:
            raise Refused(
                400,
                f"up to {told:,} log-probabilities are asked for, but one request may ask for "
                f"{self.settings.logprobs:,}: answers times tokens times logprobs; ask for fewer",
                param="logprobs",
                code="too_many_logprobs",
            )

    def sampling(
        self,
        asked: Generation,
        max_tokens: int,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Sampling:
        """How the answer is to be chosen.

        What is not given is as the model's generation_config.json has it, else as OpenAI has it.
        """
        default = self.engine.served.generation
        self._check_tokens(asked.stop_token_ids or (), "stop_token_ids")
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        if not all(map(is_unicode, stop)):
            raise Refused(400, "a stop text has half a character in it", param="stop")
        return Sampling(
            max_tokens=max_tokens,
            temperature=_first(asked.temperature, default.temperature, 1.0),
            top_p=_first(asked.top_p, default.top_p, 1.0),
            top_k=max(0, int(_first(asked.top_k, default.top_k, 0))),
            min_p=_first(asked.min_p, default.min_p, 0.0),
            repetition_penalty=_first(asked.repetition_penalty, default.repetition_penalty, 1.0),
            logit_bias=self._biases(asked),
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            seed=asked.seed,
            stop=stop,
            stop_ids=frozenset(asked.stop_token_ids or ()),
            ignore_eos=bool(asked.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _check_tokens(self, ids: Iterable[int], field: str) -> None:
        """Refuse a token that the model does not have, by the name of the field it stands in."""
        try:
            self.words.check_ids(list(ids))
        except ConfigError as error:
            raise Refused(400, f"{field}: {error}", param=field, code="invalid_value") from error

    def _biases(self, asked: Generation) -> tuple[tuple[int, float], ...]:
        """What is added to tokens' logits. Raises Refused for a token that does not exist."""
        biases = {int(token): bias for token, bias in (asked.logit_bias or {}).items()}
        self._check_tokens(biases, "logit_bias")
        return tuple((token, bias) for token, bias in biases.items() if bias)


def _first(*values: float | None) -> float:
    """The first that is given."""
    return next(value for value in values if value is not None)


def numbered(sampling: Sampling, n: int) -> Sequence[Sampling]:
    """The sampling of each of n answers; with a seed, they have seeds of their own."""
    if sampling.seed is None:
        return [sampling] * n
    return [replace(sampling, seed=_wrapped(sampling.seed + number)) for number in range(n)]


def _wrapped(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def new_id(kind: str) -> str:
    """A name for a response.

    >>> new_id("cmpl")[:5]
    'cmpl-'
    """
    return f"{kind}-{uuid4().hex}"
