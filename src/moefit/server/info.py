"""What the server says of itself and of the model's words.

Owns the endpoints for models, tokens, health, version and metrics.
"""

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
    """The one model."""
    return ModelCard(
        id=service.settings.name,
        created=service.created,
        max_model_len=service.engine.max_model_len,
        chat=service.words.has_template,
    )


def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None:
        return conversation_ids(service.words, body)
    assert body.prompt is not None
    return service.words.ids(body.prompt, special=body.add_special_tokens)


def _detokenize(service: Service, body: DetokenizeRequest) -> str:
    service.words.check_ids(body.tokens)
    return service.words.text(body.tokens, special=True)


def _tokenizer_info(service: Service) -> TokenizerInfo:
    words = service.words
    if words.tokenizer is None:
        raise APIError(404, "this model has no tokenizer; it takes token ids", code="no_tokenizer")
    special = words.tokenizer.special_tokens_map
    return TokenizerInfo(
        tokenizer_class=type(words.tokenizer).__name__,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=words.template if words.has_template else None,
        vocab_size=words.size,
        model_max_length=service.engine.max_model_len,
    )


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """What is served here."""
        return ModelList(data=[model_card(service)])

    @routes.get("/v1/models/{name:path}")
    async def model(name: Annotated[str, Path()]) -> ModelCard:
        """The model of that name."""
        service.check_model(name)
        return model_card(service)

    @routes.post("/tokenize")
    async def tokenize(body: Annotated[TokenizeRequest, Body()]) -> TokenizeResponse:
        """A text's tokens."""
        service.check_model(body.model)
        tokens = await service.run_in_thread(_tokenize, service, body)
        most = service.engine.max_model_len
        return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=most)

    @routes.post("/detokenize")
    async def detokenize(body: Annotated[DetokenizeRequest, Body()]) -> DetokenizeResponse:
        """Tokens' text."""
        service.check_model(body.model)
        return DetokenizeResponse(prompt=await service.run_in_thread(_detokenize, service, body))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Special tokens and the chat template."""
        return await service.run_in_thread(_tokenizer_info, service)

    @routes.get("/health", response_model_exclude_none=True)
    async def health() -> HealthResponse:
        """Say whether requests are served.

        200 with status `ok`, or `degraded` and the problems while experts cannot be read: requests
        are taken, but answers may suffer. 503 while nothing can be served: the server is shutting
        down, its engine has failed, or requests fail one after the other because experts cannot be
        read. The last ends by itself a minute after such a request, so that others can try.
        """
        service.check_open()
        service.check_storage()
        if problems := service.problems():
            return HealthResponse(status="degraded", problems=problems)
        return HealthResponse()

    @routes.get("/version")
    async def version() -> VersionResponse:
        """Of moefit."""
        return VersionResponse(version=moefit.__version__)

    plain: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @routes.get("/metrics", response_class=Response, responses=plain)
    async def metrics() -> Response:
        """For Prometheus."""
        content = await service.operate(generate_latest, service.telemetry.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return routes
