"""GET and POST /v1/memory: what is in memory, and the budget and mode that it is kept in.

Owns the picture that the page and `moefit budget` show, and changing it while requests run.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict

from moefit.errors import MoefitError
from moefit.plan.plan_file import Plan
from moefit.serve.memory.budget import parse_bytes
from moefit.serve.model import ServedModel
from moefit.server.errors import APIError
from moefit.server.openai_schema import MemoryRequest
from moefit.server.service import Service

_COUNTED = (
    "hits",
    "fetches",
    "substitutions",
    "hit_rate",
    "substituted_mass",
    "bytes_read",
    "swaps",
    "loads",
    "load_seconds",
    "load_failures",
    "wait_seconds",
)


class BlockState(BaseModel):
    """A MoE block's experts; see `BlockView`."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    experts: int
    slots: int
    resident: list[int]
    formats: list[str | None]
    importance: list[float]


class Requests(BaseModel):
    """How many requests there are now."""

    running: int
    waiting: int


class Latency(BaseModel):
    """Seconds of the last minutes: to the first token, and between tokens; null if none."""

    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None


class PlanSummary(BaseModel):
    """The plan in force: what it says, and its loss of perplexity, give or take `margin`."""

    words: str
    loss: float
    margin: float
    tokens_per_second: float


class MemoryState(BaseModel):
    """What is in memory. Bytes; `kv_tokens` are those that the KV cache is reserved for.

    floor, everything, most: budgets that hold the fewest experts, all of them, and all of them in
    the best format; everything_in: all of them in a format, where experts differ in it. plan: null
    where nothing was planned, or what was planned has been changed since. problems: what is wrong,
    as `/health` says it; empty if nothing is.
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
    kv_tokens: int
    kv_tokens_used: int
    blocks: list[BlockState]
    requests: Requests
    tokens_per_second: float
    latency: Latency
    counters: dict[str, Any]
    problems: list[str]


def memory_state(service: Service) -> MemoryState:
    """The picture now."""
    engine = service.engine
    report, stats = engine.served.report(), engine.stats()
    budget, counters = report["budget"], {name: report[name] for name in _COUNTED}
    counters["budget_changes"] = dict(service.telemetry.changes)
    live = service.live_plan
    ends = {name: budget[name] for name in ("floor", "everything", "most")}
    if live:
        ends = dict(zip(ends, (*live.ends, live.ends[1]), strict=True))
    same = ("mode", "prefill", "process_bytes", "peak_process_bytes", "slot_bytes", "spare_bytes")
    return MemoryState(
        model=service.settings.name,
        bound=engine.served.policy.bound,
        budget=budget,
        everything_in=engine.served.budget.all_resident_bytes_in(),
        plan=_predicted(live.plan) if live and live.plan else None,
        kv_tokens=stats.kv_tokens,
        kv_tokens_used=stats.kv_tokens_used,
        blocks=[BlockState.model_validate(view) for view in engine.served.views()],
        requests=Requests(running=stats.running, waiting=stats.waiting),
        tokens_per_second=stats.tokens_per_second,
        latency=Latency(**service.telemetry.latency()),
        counters=counters,
        problems=service.problems(),
        **ends,
        **{name: report[name] for name in same},
    )


def _predicted(plan: Plan) -> PlanSummary:
    one = plan.predicted
    return PlanSummary(
        words=plan.configuration.in_words(),
        loss=one.loss,
        margin=one.margin,
        tokens_per_second=one.speed,
    )


def apply_change(service: Service, body: MemoryRequest) -> MemoryState:
    """Carry a change out, all of it or nothing; waits until it is in force."""
    given = body.model_fields_set
    if not given:
        raise APIError(400, "nothing to change; give bytes, mode, prefill or bound")
    live = service.live_plan
    try:
        if live is not None and given == {"bytes"}:
            live.change(None if body.bytes is None else parse_bytes(body.bytes))
        else:
            service.engine.between_steps(lambda: _change(service, body))
    except MoefitError:
        service.telemetry.changed("refused")
        raise
    except OSError as error:
        service.telemetry.changed("failed")
        raise APIError(
            503, "the system has no such memory now; everything is as it was", code="no_memory"
        ) from error
    service.telemetry.changed("ok")
    return memory_state(service)


def _change(service: Service, body: MemoryRequest) -> None:
    _set(service.engine.served, body)
    if service.live_plan is not None:
        service.live_plan.leave()


def _set(served: ServedModel, body: MemoryRequest) -> None:
    """First what is easily undone: the mode; then the budget, which undoes itself if it fails."""
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
            served.set_mode(before.mode, prefill=before.prefill, bound=before.bound)
            raise


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.get("/v1/memory")
    async def get_memory() -> MemoryState:
        """Which experts are in memory, and in which budget."""
        return await service.operate(memory_state, service)

    @routes.post("/v1/memory")
    async def set_memory(body: Annotated[MemoryRequest, Body()]) -> MemoryState:
        """Change budget and mode while requests run; answers when the change is in force.

        A server that was planned for its budget plans for the new one, if that is all that is
        asked for.
        """
        return await service.operate(apply_change, service, body)

    return routes
