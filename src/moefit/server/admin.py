"""Endpoints that generate nothing: memory, models, tokenization, health, version and metrics.

GET and POST /v1/memory return the state that the page and `moefit budget` show, and change budget
and mode while requests run.
"""

from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import moefit
from moefit.engine.engine import Engine
from moefit.errors import ConfigError, MoefitError
from moefit.serve.config import Policy
from moefit.serve.memory.budget import format_bytes, parse_bytes
from moefit.serve.memory.follow import AUTO_MEMORY
from moefit.serve.model import ServedModel
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
from moefit.server.operation.memory_state import MemoryState, memory_state
from moefit.server.operation.request_id import client_of
from moefit.server.service import Service


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
    _apply(service.engine, body)
    if service.live_plan is not None:
        service.live_plan.clear()


def _apply(engine: Engine, body: MemoryRequest) -> None:
    """Set the mode first, which is easy to revert; a failing budget change reverts itself."""
    served, given = engine.served, body.model_fields_set
    before = served.policy
    if given - {"bytes"}:
        policy = body.model_dump(include={"prefill", "bound"}, exclude_none=True)
        if body.mode is None:
            policy.setdefault("prefill", before.prefill)
        served.set_mode(body.mode or before.mode, **policy)
    if "bytes" in given:
        try:
            engine.set_memory(body.bytes)
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
