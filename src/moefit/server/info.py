"""Endpoints for models, tokenization, health, version and metrics."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import moefit
from moefit.server.chat import conversation_ids
from moefit.server.errors import APIError
from moefit.server.openai_schema import (
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from moefit.server.service import Service


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
        return conversation_ids(service.tokenizer, body)
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


def router(service: Service) -> APIRouter:
    """Return the router with all informational endpoints."""
    routes = APIRouter()
    _add_model_routes(routes, service)
    _add_status_routes(routes, service)
    return routes


def _add_model_routes(routes: APIRouter, service: Service) -> None:
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


def _add_status_routes(routes: APIRouter, service: Service) -> None:
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
    async def metrics() -> Response:
        """Return metrics in Prometheus format."""
        content = await service.run_admin(generate_latest, service.telemetry.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)
