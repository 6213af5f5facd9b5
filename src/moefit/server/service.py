"""State shared by all endpoints: engine, tokenizer, metrics, request limits and the live plan.

`Service` validates requests and converts them to `SamplingParams`. `LivePlan` replans when the
budget of a server with a plan changes, and applies the new plan between two steps.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from threading import Lock
from time import time
from typing import TypeVar
from uuid import uuid4

from prometheus_client import CollectorRegistry

import moefit
from moefit.engine.api import SamplingParams
from moefit.engine.engine import Engine
from moefit.engine.request_state import eos_token_ids
from moefit.engine.structured.grammar import Grammar, GrammarCompiler
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan
from moefit.plan.search import SLACK
from moefit.serve.memory.follow import BudgetFollower
from moefit.server.errors import APIError, naming
from moefit.server.metrics import PREFIX, ModelCollector, Telemetry
from moefit.server.middleware import ServerSettings
from moefit.server.openai_schema import GenerationRequest
from moefit.server.operation.history import History
from moefit.server.operation.keys import Keys
from moefit.server.operation.limits import KeyCollector, KeyLimits
from moefit.server.operation.requests import RequestTable
from moefit.server.operation.traces import RequestTraces
from moefit.server.structured.trials import GrammarTrials
from moefit.server.tokenizer import RequestTokenizer, is_unicode
from moefit.server.tools.dialect import Dialect, dialect_of

_WITHOUT_PLAN = "give a mode with the budget (--mode exact) to set it without a plan"


class LivePlan:
    """The plan in force, and a function that plans for another budget.

    Args:
        engine: Engine whose model is served by the plan.
        plan: Current plan; None after a change that was not planned.
        make: Returns a plan for a budget in bytes.

    Attributes:
        plan: Current plan; None after a change that was not planned.
        limits: Smallest budget that can be planned for, and the one that holds everything.
    """

    def __init__(self, engine: Engine, plan: Plan, make: Callable[[int], Plan]):
        self._engine, self._make = engine, make
        self.plan: Plan | None = plan
        low, high = engine.served.placement_budget.bounds
        self.limits = low + SLACK, high + SLACK
        self._rule, self._rest = plan.rule, plan.configuration.dense_precision
        self._planning = Lock()

    def set_budget(self, memory: int | None) -> None:
        """Plan for a budget and apply the plan.

        Args:
            memory: Budget in bytes; None uses as much as the model needs.

        Raises:
            APIError: If another change is being planned.
            ConfigError: If planning fails. The current plan stays in force.
        """
        if not self._planning.acquire(blocking=False):
            raise APIError(
                409, "another budget is being planned; try again when it is in force", code="busy"
            )
        try:
            self._replan(memory)
        finally:
            self._planning.release()

    def clear(self) -> None:
        """Discard the plan, after a change without planning. Call between two steps."""
        self.plan = None

    def _replan(self, memory: int | None) -> None:
        try:
            plan = self._make(self.limits[1] if memory is None else memory)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_WITHOUT_PLAN}") from error
        chosen = plan.configuration
        if (plan.rule, chosen.dense_precision) != (self._rule, self._rest):
            raise ConfigError(
                f"the newest profile uses the routing rule {plan.rule}, but the server uses "
                f"{self._rule}; run moefit profile with that --rule again, or {_WITHOUT_PLAN}"
            )
        self._engine.between_steps(lambda: self._apply(replace(plan, memory=memory)))

    def _apply(self, plan: Plan) -> None:
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
    """Prompt and sampling parameters of one choice."""

    prompt: Sequence[int]
    sampling: SamplingParams

    def max_logprobs(self, longest: int) -> int:
        """Return how many log-probabilities may be stored until the request ends.

        Args:
            longest: Tokens of prompt and completion at most.
        """
        body, most = self.sampling, min(self.sampling.max_tokens, longest)
        answer = 0 if body.logprobs is None else most * (1 + body.logprobs)
        prompt = 0
        if body.prompt_logprobs is not None:
            prompt = len(self.prompt) * (1 + body.prompt_logprobs)
        return answer + prompt


class Service:
    """One model behind one address.

    Attributes:
        decoder_only: Whether completions continue the prompt.
        draining: Whether to finish current requests and reject new ones.
        leaving: Whether another server takes over: what is still received is answered, and its
            connection closed.
        live_plan: The plan, if the server was started with one.
        follower: Lets the budget follow free memory, on a CPU without a plan.
        engine: The engine.
        settings: Server settings.
        keys: API keys in force.
        limits: What they allow and have used.
        key_registry: Metrics of that, which operators alone may see.
        requests: Requests that run or wait.
        history: Changes of the budget and errors of requests.
        traces: Makes OpenTelemetry spans of requests; None does not.
        grammars: Grammars of requests that are compiled.
        trials: Compiles new ones.
    """

    def __init__(self, engine: Engine, settings: ServerSettings):
        self.engine, self.settings, self.created = engine, settings, int(time())
        model = engine.served.model
        text = model.config.get_text_config(decoder=True)
        try:
            tokenizer = engine.served.tokenizer
        except ConfigError:
            tokenizer = None
        self.decoder_only = not model.config.is_encoder_decoder
        self.tokenizer = RequestTokenizer(
            tokenizer, size=text.vocab_size, max_tokens=lambda: engine.max_model_len
        )
        self.grammars = GrammarCompiler(
            tokenizer, size=text.vocab_size, eos_ids=eos_token_ids(engine.served)
        )
        self.trials = GrammarTrials(self.grammars)
        self._dialect: tuple[str, Dialect] | None = None  # with the template that it is of
        self.telemetry = Telemetry(settings.name)
        self.telemetry.registry.register(
            ModelCollector(settings.name, engine.stats, engine.served.report)
        )
        self.keys = Keys(settings.api_key, settings.keys_file)
        self.limits = KeyLimits(self.keys)
        self.key_registry = CollectorRegistry()
        self.key_registry.register(KeyCollector(settings.name, self.limits, self.keys, PREFIX))
        self.requests, self.history = RequestTable(engine), History()
        self.traces: RequestTraces | None = None  # if they are sent to a collector
        self.draining = self.leaving = False
        self.live_plan: LivePlan | None = None  # if the server was started with a plan
        self.follower: BudgetFollower | None = None  # if the budget can follow free memory
        # Few threads: each has its own heap, which counts towards the budget.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="moefit-http")
        self._admin_threads = ThreadPoolExecutor(2, thread_name_prefix="moefit-operator")

    def dialect(self) -> Dialect:
        """Return the model's form of calls and reasoning, of its current chat template."""
        template = self.tokenizer.template if self.tokenizer.has_template else ""
        if self._dialect is None or self._dialect[0] != template:
            settings = self.settings
            made = dialect_of(
                self.tokenizer.backend, template, settings.tool_parser, settings.reasoning_parser
            )
            self._dialect = template, made
        return self._dialect[1]

    async def run_in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run a slow function without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _in_context(work, *arguments))

    async def run_admin(self, work: Callable[..., T], *arguments: object) -> T:
        """Like `run_in_thread`, on threads that requests cannot block."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._admin_threads, _in_context(work, *arguments))

    def close(self, *, wait: bool = False) -> None:
        """Stop the threads and the template process.

        Args:
            wait: Return only after running functions have ended.
        """
        self.tokenizer.close()
        self.trials.close(wait=wait)
        for threads in (self._threads, self._admin_threads):
            threads.shutdown(wait=wait, cancel_futures=True)

    def now(self) -> int:
        """Return the current time in seconds, for responses."""
        return int(time())

    def problems(self) -> list[str]:
        """Return problems that do not prevent serving, as sentences."""
        if not self.engine.served.loads_failing:
            return []
        return [
            "experts cannot be read from storage: responses may use other experts than the router "
            "chose, or fail; see the server's log"
        ]

    def check_storage(self) -> None:
        """Raise APIError if several requests in a row failed because experts cannot be read."""
        if self.engine.steps_fail and (problems := self.problems()):
            raise APIError(503, f"requests fail: {problems[0]}", code="storage_failed")

    def check_model(self, name: str | None) -> None:
        """Raise APIError if a request names another model."""
        if name is not None and name != self.settings.name:
            raise APIError(
                404,
                f"this model is not served; use {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Raise APIError if the engine has failed or the server is shutting down."""
        if self.engine.failure is not None:
            raise APIError(
                503,
                "the engine has failed; restart the server (see its log for the error)",
                code="engine_failed",
            )
        if self.draining:
            raise APIError(503, "the server is shutting down", code="shutting_down")

    def check_choices(self, body: GenerationRequest, prompts: int) -> None:
        """Raise APIError for too many choices, or stream_options without stream."""
        n = body.n or 1
        if n * prompts > self.settings.answers:
            raise APIError(
                400,
                f"n={n} times {prompts} prompts is {n * prompts} choices, but one request "
                f"may have at most {self.settings.answers}",
                param="n",
                code="too_many_answers",
            )
        if body.streams_usage and not body.stream:
            raise APIError(400, "stream_options requires stream=true", param="stream_options")

    def check_length(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Raise RequestTooLargeError if prompt and completion never fit, before slow work."""
        self.engine.check_length(len(prompt), max_tokens)

    def check_logprobs(self, engine_requests: Sequence[EngineRequest]) -> None:
        """Raise APIError if a request may need too many log-probabilities."""
        total = sum(item.max_logprobs(self.engine.max_model_len) for item in engine_requests)
        if total > self.settings.logprobs:
            raise APIError(
                400,
                f"up to {total:,} log-probabilities are requested, but one request may have at "
                f"most {self.settings.logprobs:,} (choices times tokens times logprobs)",
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
        grammar: Grammar | None = None,
        visible: frozenset[int] = frozenset(),
    ) -> SamplingParams:
        """Return the sampling parameters of a request.

        Missing values come from the model's generation_config.json, then from OpenAI's defaults.
        """
        default = self.engine.served.generation
        self._check_tokens(body.stop_token_ids or (), "stop_token_ids")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if not all(map(is_unicode, stop)):
            raise APIError(400, "a stop text contains an unpaired surrogate", param="stop")
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
            grammar=grammar,
            visible=visible,
        )

    def _check_tokens(self, ids: Iterable[int], field: str) -> None:
        """Raise APIError, naming the field, if a token id is outside the vocabulary."""
        with naming(field):
            self.tokenizer.check_ids(list(ids))

    def _biases(self, body: GenerationRequest) -> tuple[tuple[int, float], ...]:
        """Return the logit biases by token id. Raises APIError for an invalid token id."""
        biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
        self._check_tokens(biases, "logit_bias")
        return tuple((token, bias) for token, bias in biases.items() if bias)


def _in_context(work: Callable[..., T], *arguments: object) -> Callable[[], T]:
    """Return a call with the present context variables: logs in threads name the request too."""
    context = copy_context()
    return lambda: context.run(work, *arguments)


def _first(*values: float | None) -> float:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


def sampling_per_choice(sampling: SamplingParams, n: int) -> Sequence[SamplingParams]:
    """Return sampling parameters for each of n choices, with consecutive seeds if one is given."""
    if sampling.seed is None:
        return [sampling] * n
    seeds = ((sampling.seed + number + 2**63) % 2**64 - 2**63 for number in range(n))
    return [replace(sampling, seed=seed) for seed in seeds]


def new_id(kind: str) -> str:
    """Return a unique id for a response.

    >>> new_id("cmpl")[:5]
    'cmpl-'
    """
    return f"{kind}-{uuid4().hex}"
