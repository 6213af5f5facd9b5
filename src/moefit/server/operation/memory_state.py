"""State of a served model as GET /v1/memory returns it: bytes, residents, requests and counters."""

from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel

from moefit.engine.api import EngineStats
from moefit.engine.invariance import Invariance
from moefit.engine.prefix.cache import PrefixStats
from moefit.engine.prefix.reuse import Coverage
from moefit.engine.speculation.drafts import SpeculationStats
from moefit.engine.speculation.requests import SpeculationCoverage
from moefit.host import processors
from moefit.plan.plan_file import Plan
from moefit.quant.backend import backend_status
from moefit.quant.library import level_note
from moefit.serve.memory.follow import BudgetFollower
from moefit.serve.report import BlockView
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


class ProcessorState(BaseModel):
    """What computes on the CPU.

    Attributes:
        kernels: Kernels in use: their instruction set level, or `torch` and why there are none.
        kernels_note: Why they are not those that were asked for; may be empty.
        threads: Number of threads that compute.
        threads_reason: Why so many.
        logical: Logical processors that this process may run on.
        cores: Physical cores that these are part of.
        quota: Processors' worth of time that control groups allow; null without a limit.
    """

    kernels: str
    kernels_note: str
    threads: int
    threads_reason: str
    logical: int
    cores: int
    quota: float | None


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
        horizon: Layers ahead for which experts are read; null where nothing is predicted.
        predictor: `probes`, `next router`, `pregated` or `previous token`; null if nothing
            predicts.
        probes: Trained predictors; null if there are none.
        probes_ignored: Why a file of probes is not used; may be empty.
    """

    setting: str
    obstacle: str
    pays: bool | None
    horizon: int | None
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
        dense_from: Where dense weights are from: the checkpoint as they are, encoded while
            loading, or packed.
        kv_cache_dtype: What the KV cache holds: values in a dtype, or int8.
        kv_tokens: Tokens that the KV cache holds now.
        kv_tokens_reserved: Tokens that it holds from the start, and at least.
        kv_tokens_most: Tokens to which it may grow in this budget.
        prefix_cache: Keys and values that requests reuse.
        speculation: Drafted tokens.
        prefetch: Experts that are predicted and read early.
        plan: The plan in force; null if there is none or settings were changed since.
        problems: Problems as `/health` reports them.
        invariance: Whether answers depend on other requests.
        processor: Kernels and threads that compute.
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
    dense_from: str
    kv_cache_dtype: str | None
    kv_tokens: int
    kv_tokens_reserved: int
    kv_tokens_most: int
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
    processor: ProcessorState
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
        "spare_bytes", "checkpoint", "adapter", "dense_from",
    )  # fmt: skip
    return MemoryState(
        model=service.settings.name,
        bound=engine.served.policy.bound,
        budget=budget,
        everything_in=engine.served.budget.all_resident_bytes_in(),
        plan=_plan_summary(live.plan) if live and live.plan else None,
        kv_tokens=stats.kv_tokens,
        kv_tokens_reserved=stats.kv_tokens_reserved,
        kv_tokens_most=stats.kv_tokens_most,
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
        processor=_processor(engine.served.model.device),
        following=_following(service.follower),
        **limits,
        **{name: report[name] for name in same},
    )


def _processor(device: torch.device) -> ProcessorState:
    found, threads = processors(), torch.get_num_threads()
    return ProcessorState(
        kernels=backend_status(device),
        kernels_note=level_note(),
        threads=threads,
        threads_reason=found.describe(threads),
        logical=found.logical,
        cores=found.cores,
        quota=found.quota,
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
