"""Endpoints that generate nothing: memory, models, tokenization, health, version and metrics.

GET and POST /v1/memory return the state that the page and `moefit budget` show, and change budget
and mode while requests run.
"""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

import moefit
from moefit.engine.api import EngineStats
from moefit.engine.invariance import Invariance
from moefit.engine.prefix.cache import PrefixStats
from moefit.engine.prefix.reuse import Coverage
from moefit.engine.speculation.drafts import SpeculationStats
from moefit.engine.speculation.requests import SpeculationCoverage
from moefit.errors import ConfigError, MoefitError
from moefit.plan.plan_file import Plan
from moefit.serve.config import Policy
from moefit.serve.memory.budget import format_bytes, parse_bytes
from moefit.serve.memory.follow import AUTO_MEMORY, BudgetFollower
from moefit.serve.model import ServedModel
from moefit.serve.report import BlockView
from moefit.server.chat import conversation_ids
from moefit.server.errors import APIError
from moefit.server.openai_schema import (
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    MemoryRequest,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from moefit.server.operation.request_id import client_of
from moefit.server.service import Service

_COUNTERS = (
    "hits",
    "fetches",
    "computed_on_host",
    "substitutions",
    "hit_rate",
    "substituted_mass",
    "bytes_read",
    "swaps",
    "prefetches",
    "prefetches_used",
    "prefetched_bytes",
    "prefetch_wasted_bytes",
    "loads",
    "load_seconds",
    "load_failures",
    "wait_seconds",
)


class Requests(BaseModel):
    """Current numbers of requests."""

    running: int
    waiting: int


class Latency(BaseModel):
    """Percentiles over the last minutes, in seconds: time to first token, inter-token latency."""

    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None


class PlanSummary(BaseModel):
    """The plan in force, and its predicted increase of perplexity, within `margin`."""

    words: str
    loss: float
    margin: float
    tokens_per_second: float


class UncoveredOperation(BaseModel):
    """An operation with which other requests may change an answer: where, and what it is."""

    module: str
    reason: str


class InvarianceState(BaseModel):
    """Whether answers are independent of other requests and of the number of threads.

    Attributes:
        covered: Whether all operations are.
        deterministic: Whether the server was started with `--deterministic`: answers then do not
            depend on other requests in any case.
        not_covered: Operations that are not.
    """

    covered: bool
    deterministic: bool
    not_covered: list[UncoveredOperation]


class CheckpointFormats(BaseModel):
    """How the checkpoint stores the weights, by names of formats.

    Attributes:
        experts: Formats of experts.
        dense: Formats of all other weights.
        expert_bytes: Bytes of the largest expert in the files.
        held: Formats of experts whose codes slots of the format `native` hold as they are; those of
            others hold values in the model's dtype.
        held_in: The same by block, where a block has such experts.
    """

    experts: list[str]
    dense: list[str]
    expert_bytes: int
    held: list[str]
    held_in: dict[str, list[str]]


class FollowingState(BaseModel):
    """How the budget follows free memory. Sizes are in bytes.

    Attributes:
        active: Whether it does now.
        least: Smallest budget.
        most: Largest budget.
        headroom: What stays free for other processes.
    """

    active: bool
    least: int
    most: int
    headroom: int


class PrefixFilesState(BaseModel):
    """Files of keys and values: their number, bytes and limit, and totals since the start.

    Attributes:
        read: Tokens whose keys and values were read.
        written: Tokens whose keys and values were written.
        damaged: Files that were not used because their content was wrong.
    """

    files: int
    bytes: int
    limit: int
    read: int
    written: int
    damaged: int


class PrefixCacheState(BaseModel):
    """Keys and values of earlier prompts and answers that requests reuse. Counts are of tokens.

    Attributes:
        active: Whether they are reused in the mode in force.
        reason: Why not, or what to know; may be empty.
        tokens: Held in places of the KV cache that no running request has reserved.
        bytes: Size of their keys and values.
        shared: Of running requests, which others may reuse too.
        queries: Of prompts that were looked up, since the server was started.
        hits: Those found.
        evicted: Removed because running requests needed their places.
        disk: Files in which they survive a restart; null without `--prefix-cache-dir`.
    """

    active: bool
    reason: str
    tokens: int
    bytes: int
    shared: int
    queries: int
    hits: int
    evicted: int
    disk: PrefixFilesState | None


class SpeculationState(BaseModel):
    """Tokens that are drafted and verified several at a time, with totals since the start.

    Attributes:
        active: Whether they are in the mode in force.
        reason: Why not, or by what.
        drafts: Drafts that were verified.
        drafted: Their tokens.
        accepted: Those that were right.
        plain_steps: Steps without drafts because verifying them would have been slower.
    """

    active: bool
    reason: str
    drafts: int
    drafted: int
    accepted: int
    plain_steps: int


class ProbesState(BaseModel):
    """Probes that predict experts, and how well they did on text that they were not fitted on.

    Attributes:
        text: Name of the text that they were fitted on.
        tokens: Its tokens.
        number: Of the probes in memory.
        bytes: Their size, a part of the budget's `weights`.
        recall: Share of the next layer's experts that they found; null if there are none.
        next_router_recall: The same of the next layer's router.
    """

    text: str
    tokens: int
    number: int
    bytes: int
    recall: float | None
    next_router_recall: float | None


class PrefetchState(BaseModel):
    """Whether exact mode reads experts early, and what predicts them.

    Attributes:
        setting: Of `--prefetch`; `pregated` for models that know their next experts.
        obstacle: Why nothing is read early now; may be empty.
        pays: Whether it was measured to be faster; null where it is not measured.
        predictor: `probes`, `next router` or `pregated`; null if nothing predicts.
        probes: Trained predictors; null if there are none.
        probes_ignored: Why a file of probes is not used; may be empty.
    """

    setting: str
    obstacle: str
    pays: bool | None
    predictor: str | None
    probes: ProbesState | None
    probes_ignored: str


class MemoryState(BaseModel):
    """State of the memory. Sizes are in bytes.

    Attributes:
        floor: Smallest budget, with the fewest experts in memory.
        everything: Budget that holds all experts.
        most: Budget that holds all experts in the best format.
        everything_in: Budget that holds all experts, by format, where formats differ.
        checkpoint: Formats of the checkpoint, and which of them slots hold.
        adapter: The folder of the adapter that is applied; null if there is none.
        kv_cache_dtype: What the KV cache holds: values in a dtype, or int8.
        kv_tokens: Tokens that the KV cache holds.
        prefix_cache: Keys and values that requests reuse.
        speculation: Drafted tokens.
        prefetch: Experts that are predicted and read early.
        plan: The plan in force; null if there is none or settings were changed since.
        problems: Problems as `/health` reports them.
        invariance: Whether answers depend on other requests.
        following: Whether the budget follows free memory (`--memory auto`), and its limits; null
            where it cannot.
    """

    model: str
    mode: str
    prefill: str
    bound: float
    budget: dict[str, int | None]
    floor: int
    everything: int
    most: int
    everything_in: dict[str, int]
    process_bytes: int
    peak_process_bytes: int
    slot_bytes: int
    spare_bytes: int
    plan: PlanSummary | None
    checkpoint: CheckpointFormats
    adapter: str | None
    kv_cache_dtype: str | None
    kv_tokens: int
    kv_tokens_used: int
    prefix_cache: PrefixCacheState
    speculation: SpeculationState
    prefetch: PrefetchState
    blocks: list[BlockView]
    requests: Requests
    tokens_per_second: float
    latency: Latency
    counters: dict[str, Any]
    problems: list[str]
    invariance: InvarianceState
    following: FollowingState | None


def memory_state(service: Service) -> MemoryState:
    """Return the current state."""
    engine = service.engine
    report, stats = engine.served.report(), engine.stats()
    budget, counters = report["budget"], {name: report[name] for name in _COUNTERS}
    counters["budget_changes"] = dict(service.telemetry.changes)
    live = service.live_plan
    limits = {name: budget[name] for name in ("floor", "everything", "most")}
    if live:
        limits = dict(zip(limits, (*live.limits, live.limits[1]), strict=True))
    same = (
        "mode", "prefill", "kv_cache_dtype", "process_bytes", "peak_process_bytes", "slot_bytes",
        "spare_bytes", "checkpoint", "adapter",
    )  # fmt: skip
    return MemoryState(
        model=service.settings.name,
        bound=engine.served.policy.bound,
        budget=budget,
        everything_in=engine.served.budget.all_resident_bytes_in(),
        plan=_plan_summary(live.plan) if live and live.plan else None,
        kv_tokens=stats.kv_tokens,
        kv_tokens_used=stats.kv_tokens_used,
        prefix_cache=_prefix_cache(engine.prefix_coverage, stats, budget["kv_cache"]),
        speculation=_speculation(engine.speculation_coverage, stats),
        prefetch=PrefetchState(**report["prefetch"]),
        blocks=engine.served.views(),
        requests=Requests(running=stats.running, waiting=stats.waiting),
        tokens_per_second=stats.tokens_per_second,
        latency=Latency(**service.telemetry.latency()),
        counters=counters,
        problems=service.problems(),
        invariance=_invariance(engine.invariance),
        following=_following(service.follower),
        **limits,
        **{name: report[name] for name in same},
    )


def _prefix_cache(coverage: Coverage, stats: EngineStats, nbytes: int) -> PrefixCacheState:
    known = stats.prefixes or PrefixStats()
    size = nbytes * known.tokens // stats.kv_tokens if stats.kv_tokens else 0
    files = stats.prefix_files
    disk = None if files is None else PrefixFilesState(**asdict(files))
    return PrefixCacheState(**asdict(coverage), bytes=size, **asdict(known), disk=disk)


def _speculation(coverage: SpeculationCoverage, stats: EngineStats) -> SpeculationState:
    totals = stats.speculation or SpeculationStats()
    return SpeculationState(
        active=coverage.active,
        reason=coverage.reason,
        drafts=totals.drafts,
        drafted=totals.drafted,
        accepted=totals.accepted,
        plain_steps=totals.plain_steps,
    )


def _following(follower: BudgetFollower | None) -> FollowingState | None:
    if follower is None:
        return None
    rule = follower.rule
    return FollowingState(
        active=follower.active, least=rule.least, most=rule.most, headroom=rule.headroom
    )


def _invariance(known: Invariance) -> InvarianceState:
    return InvarianceState(
        covered=known.covered,
        deterministic=known.deterministic,
        not_covered=[UncoveredOperation(**asdict(one)) for one in known.not_covered],
    )


def _plan_summary(plan: Plan) -> PlanSummary:
    one = plan.predicted
    return PlanSummary(
        words=plan.configuration.describe(),
        loss=one.loss,
        margin=one.margin,
        tokens_per_second=one.speed,
    )


def apply_change(service: Service, body: MemoryRequest, by: str | None = None) -> MemoryState:
    """Apply a change completely or not at all, and return the new state.

    Args:
        service: The service.
        body: What to change.
        by: Name of the client's key, for the history.

    Raises:
        APIError: If the change is empty or memory cannot be allocated.
        MoefitError: If the change is rejected.
    """
    given = body.model_fields_set
    if not given:
        raise APIError(400, "nothing to change; set bytes, mode, prefill or bound")
    live, before = service.live_plan, _in_force(service.engine.served)
    try:
        if body.bytes == AUTO_MEMORY:
            _follow(service, body)
        elif live is not None and given == {"bytes"}:
            live.set_budget(None if body.bytes is None else parse_bytes(body.bytes))
        else:
            follower = service.follower if "bytes" in given else None
            with follower.fixed() if follower else nullcontext():
                service.engine.between_steps(lambda: _change(service, body))
    except MoefitError as error:
        service.telemetry.changed("refused")
        service.history.changed(f"refused: {error}", by)
        raise
    except OSError as error:
        service.telemetry.changed("failed")
        service.history.changed("failed: the system could not provide the memory", by)
        raise APIError(
            503, "the system cannot provide this memory now; nothing was changed", code="no_memory"
        ) from error
    service.telemetry.changed("ok")
    auto = ", following free memory" if body.bytes == AUTO_MEMORY else ""
    service.history.changed(f"{before} to {_in_force(service.engine.served)}{auto}", by)
    return memory_state(service)


def _in_force(served: ServedModel) -> str:
    """Return budget and mode in words."""
    total = served.budget.total
    size = "no limit" if total is None else format_bytes(total)
    return f"{size} {served.policy.mode}"


def _follow(service: Service, body: MemoryRequest) -> None:
    """Let the budget follow free memory from now on, after changes of the mode."""
    follower = service.follower
    if follower is None:
        raise ConfigError(
            "the budget of this server cannot follow free memory, because it has a plan or the "
            "model is on a GPU; give a size, such as 4GiB"
        )
    served, rest = service.engine.served, body.model_fields_set - {"bytes"}
    before = served.policy
    if rest:
        others = MemoryRequest(**body.model_dump(include=rest))
        service.engine.between_steps(lambda: _change(service, others))
    try:
        follower.resume()
    except BaseException:
        if rest:
            service.engine.between_steps(lambda: _restore_mode(served, before))
        raise


def _change(service: Service, body: MemoryRequest) -> None:
    _apply(service.engine.served, body)
    if service.live_plan is not None:
        service.live_plan.clear()


def _apply(served: ServedModel, body: MemoryRequest) -> None:
    """Set the mode first, which is easy to revert; a failing budget change reverts itself."""
    before, given = served.policy, body.model_fields_set
    if given - {"bytes"}:
        policy = body.model_dump(include={"prefill", "bound"}, exclude_none=True)
        if body.mode is None:
            policy.setdefault("prefill", before.prefill)
        served.set_mode(body.mode or before.mode, **policy)
    if "bytes" in given:
        try:
            served.set_memory(body.bytes)
        except BaseException:
            _restore_mode(served, before)
            raise


def _restore_mode(served: ServedModel, before: Policy) -> None:
    served.set_mode(before.mode, prefill=before.prefill, bound=before.bound)


def require_operator(request: Request) -> None:
    """Raise APIError unless the client may steer the server."""
    client = client_of(request.scope)
    if not client.operator:
        raise APIError(
            403,
            f"the key {client.key!r} may not change this server; use --api-key's, or one with "
            "`operator: true` in the file of keys",
            code="not_operator",
        )


def model_card(service: Service) -> ModelCard:
    """Return the description of the served model."""
    return ModelCard(
        id=service.settings.name,
        created=service.created,
        max_model_len=service.engine.max_model_len,
        chat=service.tokenizer.has_template,
    )


def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None:
        return conversation_ids(service, body)
    assert body.prompt is not None
    return service.tokenizer.ids(body.prompt, special=body.add_special_tokens)


def _detokenize(service: Service, body: DetokenizeRequest) -> str:
    service.tokenizer.check_ids(body.tokens)
    return service.tokenizer.text(body.tokens, special=True)


def _tokenizer_info(service: Service) -> TokenizerInfo:
    tokenizer = service.tokenizer
    if tokenizer.backend is None:
        raise APIError(404, "this model has no tokenizer; send token ids", code="no_tokenizer")
    special = tokenizer.backend.special_tokens_map
    return TokenizerInfo(
        tokenizer_class=type(tokenizer.backend).__name__,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=tokenizer.template if tokenizer.has_template else None,
        vocab_size=tokenizer.size,
        model_max_length=service.engine.max_model_len,
    )


def model_router(service: Service) -> APIRouter:
    """Return the router with models and tokenization."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """List the served model."""
        return ModelList(data=[model_card(service)])

    @routes.get("/v1/models/{name:path}")
    async def model(name: Annotated[str, Path()]) -> ModelCard:
        """Return a model by name."""
        service.check_model(name)
        return model_card(service)

    @routes.post("/tokenize")
    async def tokenize(body: Annotated[TokenizeRequest, Body()]) -> TokenizeResponse:
        """Return the tokens of a text."""
        service.check_model(body.model)
        tokens = await service.run_in_thread(_tokenize, service, body)
        most = service.engine.max_model_len
        return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=most)

    @routes.post("/detokenize")
    async def detokenize(body: Annotated[DetokenizeRequest, Body()]) -> DetokenizeResponse:
        """Return the text of tokens."""
        service.check_model(body.model)
        return DetokenizeResponse(prompt=await service.run_in_thread(_detokenize, service, body))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Return special tokens and the chat template."""
        return await service.run_in_thread(_tokenizer_info, service)

    return routes


def status_router(service: Service) -> APIRouter:
    """Return the router with health, version and metrics."""
    routes = APIRouter()

    @routes.get("/health", response_model_exclude_none=True)
    async def health() -> HealthResponse:
        """Return whether requests are served.

        200 with status `ok`, or `degraded` and the problems while experts cannot be read: requests
        are accepted, but results may suffer. 503 while nothing can be served: the server is
        shutting down, its engine has failed, or several requests in a row have failed because
        experts cannot be read. The last state ends one minute after such a failure, so that other
        requests can try again.
        """
        service.check_open()
        service.check_storage()
        if problems := service.problems():
            return HealthResponse(status="degraded", problems=problems)
        return HealthResponse()

    @routes.get("/version")
    async def version() -> VersionResponse:
        """Return the version of moefit."""
        return VersionResponse(version=moefit.__version__)

    plain: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @routes.get("/metrics", response_class=Response, responses=plain)
    async def metrics(request: Request) -> Response:
        """Return metrics in Prometheus format; those of keys to operators only."""
        content = await service.run_admin(generate_latest, service.telemetry.registry)
        if client_of(request.scope).operator:
            content += await service.run_admin(generate_latest, service.key_registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return routes


def memory_router(service: Service) -> APIRouter:
    """Return the router with GET and POST /v1/memory."""
    routes = APIRouter()

    @routes.get("/v1/memory")
    async def get_memory() -> MemoryState:
        """Return which experts are in memory, and the budget."""
        return await service.run_admin(memory_state, service)

    @routes.post("/v1/memory")
    async def set_memory(body: Annotated[MemoryRequest, Body()], request: Request) -> MemoryState:
        """Change budget and mode while requests run; responds when the change is in force.

        A server started with a plan replans if only the budget changes.
        """
        require_operator(request)
        by = client_of(request.scope).key
        return await service.run_admin(apply_change, service, body, by)

    return routes
