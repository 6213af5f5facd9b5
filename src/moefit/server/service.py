"""What all endpoints share: engine, tokenizer, metrics, limits of a request, and the live plan.

`Service` checks what one request may ask for and turns it into `Sampling`. `LivePlan` makes a new
plan when the budget of a server with a plan changes, and applies it between two steps.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from time import time
from typing import TypeVar
from uuid import uuid4

import moefit
from moefit.engine.api import SamplingParams
from moefit.engine.engine import Engine
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan
from moefit.plan.search import SLACK
from moefit.server.errors import APIError
from moefit.server.metrics import ModelCollector, Telemetry
from moefit.server.middleware import ServerSettings
from moefit.server.openai_schema import GenerationRequest
from moefit.server.tokenizer import RequestTokenizer, is_unicode

_WITHOUT = "a mode beside the budget (--mode exact) sets it without a plan"


class LivePlan:
    """`make` gives a plan for a budget in bytes; `plan` None: what was planned has been changed.

    ends: the least budget that can be planned for, and the one that holds everything.
    """

    def __init__(self, engine: Engine, plan: Plan, make: Callable[[int], Plan]):
        self._engine, self._make = engine, make
        self.plan: Plan | None = plan
        low, high = engine.served.placement_budget.bounds
        self.ends = low + SLACK, high + SLACK
        self._rule, self._rest = plan.rule, plan.configuration.rest
        self._planning = Lock()

    def change(self, memory: int | None) -> None:
        """Plan for this budget and serve so; None is all that the model takes.

        Raises what planning does, and APIError while another change is being planned; everything is
        then as it was.
        """
        if not self._planning.acquire(blocking=False):
            raise APIError(
                409, "another budget is being planned; ask again when it is in force", code="busy"
            )
        try:
            self._change(memory)
        finally:
            self._planning.release()

    def leave(self) -> None:
        """Somebody has set something else than was planned; called between the same two steps."""
        self.plan = None

    def _change(self, memory: int | None) -> None:
        try:
            plan = self._make(self.ends[1] if memory is None else memory)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_WITHOUT}") from error
        chosen = plan.configuration
        if (plan.rule, chosen.rest) != (self._rule, self._rest):
            raise ConfigError(
                f"the newest profile is of the model under the rule {plan.rule}, and it is served "
                f"under {self._rule}; run moefit profile with that --rule again, or {_WITHOUT}"
            )
        self._engine.between_steps(lambda: self._serve(replace(plan, memory=memory)))

    def _serve(self, plan: Plan) -> None:
        chosen = plan.configuration
        self._engine.served.set_placement(
            chosen.placement,
            memory=plan.memory,
            mode=chosen.mode,
            manager=chosen.manager,
            **chosen.policy_settings(),
        )
        self.plan = plan


T = TypeVar("T")
FINGERPRINT = f"moefit-{moefit.__version__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One answer that is wanted."""

    prompt: Sequence[int]
    sampling: SamplingParams

    def max_logprobs(self, longest: int) -> int:
        """Log-probabilities that may have to be kept until it ends, after `longest` tokens."""
        body, most = self.sampling, min(self.sampling.max_tokens, longest)
        answer = 0 if body.logprobs is None else most * (1 + body.logprobs)
        prompt = 0
        if body.prompt_logprobs is not None:
            prompt = len(self.prompt) * (1 + body.prompt_logprobs)
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
        self.words = RequestTokenizer(tokenizer, size=text.vocab_size, most=engine.max_model_len)
        self.telemetry = Telemetry(settings.name)
        self.telemetry.registry.register(
            ModelCollector(settings.name, engine.stats, engine.served.report)
        )
        self.draining = False
        self.live_plan: LivePlan | None = None  # of a server that was planned for its budget
        # Few threads: each has a heap of its own, and all of it is in the budget.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="moefit-http")
        self._operators = ThreadPoolExecutor(2, thread_name_prefix="moefit-operator")

    async def run_in_thread(self, work: Callable[..., T], *arguments: object) -> T:
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

    def check_storage(self) -> None:
        """Refuse if requests fail because experts cannot be read, one after the other."""
        if self.engine.steps_fail and (problems := self.problems()):
            raise APIError(503, f"requests fail: {problems[0]}", code="storage_failed")

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name."""
        if name is not None and name != self.settings.name:
            raise APIError(
                404,
                f"there is no model of that name here; there is {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Refuse while the server is shutting down."""
        if self.engine.failure is not None:
            raise APIError(
                503,
                "the engine has failed and the server must be started again; its log says why",
                code="engine_failed",
            )
        if self.draining:
            raise APIError(503, "the server is shutting down", code="shutting_down")

    def check_choices(self, body: GenerationRequest, prompts: int) -> int:
        """n, if n answers to each prompt are no more than may be."""
        n = body.n or 1
        if n * prompts > self.settings.answers:
            raise APIError(
                400,
                f"n={n} times the prompts, {prompts}, are {n * prompts} answers, but one request "
                f"may ask for {self.settings.answers}",
                param="n",
                code="too_many_answers",
            )
        if body.stream_options and body.stream_options.include_usage and not body.stream:
            raise APIError(400, "stream_options is for stream=true alone", param="stream_options")
        return n

    def check_logprobs(self, engine_requests: Sequence[EngineRequest]) -> None:
        """Refuse more log-probabilities in one answer than there is memory meant for."""
        told = sum(item.max_logprobs(self.engine.max_model_len) for item in engine_requests)
        if told > self.settings.logprobs:
            raise APIError(
                400,
                f"up to {told:,} log-probabilities are asked for, but one request may ask for "
                f"{self.settings.logprobs:,}: answers times tokens times logprobs; ask for fewer",
                param="logprobs",
                code="too_many_logprobs",
            )

    def sampling(
        self,
        body: GenerationRequest,
        max_tokens: int,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """How the answer is to be chosen.

        What is not given is as the model's generation_config.json has it, else as OpenAI has it.
        """
        default = self.engine.served.generation
        self._check_tokens(body.stop_token_ids or (), "stop_token_ids")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if not all(map(is_unicode, stop)):
            raise APIError(400, "a stop text has half a character in it", param="stop")
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_first(body.temperature, default.temperature, 1.0),
            top_p=_first(body.top_p, default.top_p, 1.0),
            top_k=max(0, int(_first(body.top_k, default.top_k, 0))),
            min_p=_first(body.min_p, default.min_p, 0.0),
            repetition_penalty=_first(body.repetition_penalty, default.repetition_penalty, 1.0),
            logit_bias=self._biases(body),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
            stop=stop,
            stop_ids=frozenset(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _check_tokens(self, ids: Iterable[int], field: str) -> None:
        """Refuse a token that the model does not have, by the name of the field it stands in."""
        try:
            self.words.check_ids(list(ids))
        except ConfigError as error:
            raise APIError(400, f"{field}: {error}", param=field, code="invalid_value") from error

    def _biases(self, body: GenerationRequest) -> tuple[tuple[int, float], ...]:
        """What is added to tokens' logits. Raises APIError for a token that does not exist."""
        biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
        self._check_tokens(biases, "logit_bias")
        return tuple((token, bias) for token, bias in biases.items() if bias)


def _first(*values: float | None) -> float:
    """The first that is given."""
    return next(value for value in values if value is not None)


def numbered(sampling: SamplingParams, n: int) -> Sequence[SamplingParams]:
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
