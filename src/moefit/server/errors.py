"""Convert errors to responses in OpenAI's format.

The body is `{"error": {"message", "type", "param", "code", "request_id"}}`. Responses never contain
tracebacks or local paths.
"""

import logging
from asyncio import CancelledError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from moefit.errors import (
    BudgetTooSmallError,
    ConfigError,
    MoefitError,
    QueueFullError,
    RefusedError,
    RequestTooLargeError,
    UnsupportedModelError,
)
from moefit.server.operation.request_id import HEADER, current_request

_LOG = logging.getLogger(__name__)
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ENDPOINTS = ("/chat/completions", "/completions", "/responses", "/models")
_CHAT_HINT = "use POST /v1/chat/completions instead"
_NO_EMBEDDINGS = "it serves text generation only, without embeddings or scores"
_UNSUPPORTED_ENDPOINTS = {
    "/messages": f"Anthropic's Messages API is not supported; {_CHAT_HINT}",
    "/embeddings": _NO_EMBEDDINGS,
    "/rerank": _NO_EMBEDDINGS,
    "/score": _NO_EMBEDDINGS,
    "/moderations": "moderation is not supported",
    "/images/generations": "image generation is not supported",
    "/audio/speech": "speech synthesis is not supported",
    "/audio/transcriptions": "transcription is not supported",
}
"""Endpoints of other servers, with a hint for each."""
_STATUS_OF: Mapping[type[MoefitError], tuple[int, str]] = {
    RequestTooLargeError: (400, "context_length_exceeded"),
    BudgetTooSmallError: (400, "budget_too_small"),
    ConfigError: (400, "invalid_value"),
    UnsupportedModelError: (400, "unsupported_by_model"),
    QueueFullError: (429, "queue_full"),
    RefusedError: (503, "shutting_down"),
}


class ErrorDetail(BaseModel):
    """Message and OpenAI's type; parameter and code where applicable; id of the request."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None


class ErrorBody(BaseModel):
    """Body of an error response."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 413, 429, 500, 503)
}


class APIError(HTTPException):
    """An error response; `detail` is its message.

    Args:
        status: HTTP status.
        message: What was given, why it is rejected, and what works.
        param: Name of the parameter.
        code: Machine-readable code.
        retry_after: Seconds after which the request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.param, self.code = param, code


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Name the field of a request in errors about its value."""
    try:
        yield
    except ConfigError as error:
        raise APIError(400, f"{field}: {error}", param=field, code="invalid_value") from error


class PanicError(RuntimeError):
    """A library raised an error that is not an `Exception`, such as a panic in Rust."""


@contextmanager
def convert_panics() -> Iterator[None]:
    """Convert errors that are not `Exception`s to PanicError, except cancellation."""
    try:
        yield
    except (Exception, CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        raise PanicError(f"{type(error).__name__}: {error}") from error


class PanicMiddleware:
    """Middleware that converts panics in endpoints to ordinary errors.

    Frameworks handle `Exception` only, and asyncio stops the event loop at a SystemExit.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        with convert_panics():
            await self._app(scope, receive, send)


def _printable(text: str, most: int) -> str:
    """Return text as valid UTF-8, without unpaired surrogates, and shortened."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole if len(whole) <= most else f"{whole[:most]}..."


def error_json(error: HTTPException) -> dict[str, Any]:
    """Return the JSON of an HTTP exception, with message and parameter shortened."""
    status, param = error.status_code, getattr(error, "param", None)
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {
        "message": _printable(str(error.detail), 2000),
        "type": kind,
        "param": None if param is None else _printable(param, 200),
        "code": getattr(error, "code", None),
        "request_id": current_request.get(),
    }
    return {"error": body}


def error_response(error: HTTPException) -> JSONResponse:
    """Return the response for an HTTP exception."""
    headers = dict(error.headers or {})
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status_code == 429:
        headers.setdefault("Retry-After", "1")
    if (name := current_request.get()) is not None:
        headers[HEADER] = name
    return JSONResponse(error_json(error), error.status_code, headers)


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any = None) -> APIError:
    """Return the response for pydantic's errors, without the values themselves.

    Args:
        errors: Errors as pydantic reports them.
        body: The request body, which distinguishes field names from names of union members.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        why = f"the body is not JSON: {first['ctx']['error']}"
        return APIError(400, why, code="invalid_json")
    if not first["loc"][1:]:
        return APIError(400, _body_message(first), code="invalid_body")
    places = [_field_path(one, body) for one in errors if one["loc"][1] == first["loc"][1]]
    # Each member of a union reports its own errors; the longest path is the intended one.
    place = max(places, key=lambda one: (len(one), [n for n in one if isinstance(n, int)]))
    same = [one for one in errors if _field_path(one, body) == place]
    name = _path_text(place)
    if (why := _unsupported(same[0])) is not None:
        message = f"unsupported parameter {name!r}: {why}"
        return APIError(400, message, param=name, code="unsupported_parameter")
    code = "missing_parameter" if same[0]["type"] == "missing" else "invalid_value"
    words = list(dict.fromkeys(one["msg"] for one in same))[:4]
    return APIError(400, f"{name}: {'; or '.join(words)}", param=name, code=code)


def _field_path(error: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Return the fields and indices that lead to an error, without names of union members."""
    steps, place = list(error["loc"][1:]), []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(body, dict) and (step in body or (last and error["type"] == "missing")):
            body = body.get(step)
        elif isinstance(body, list) and isinstance(step, int) and step < len(body):
            body = body[step]
        elif number:  # the first step is always a field
            continue
        place.append(step)
    return (*place, *error.get("ctx", {}).get("within", ()))


def _path_text(place: Sequence[int | str]) -> str:
    """Return a path in Python notation.

    >>> _path_text(["messages", 2, "content"])
    'messages[2].content'
    """
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in place]
    return "".join(steps).removeprefix(".")


def _body_message(error: Mapping[str, Any]) -> str:
    """Return the message for an error of the whole body."""
    if error["type"] == "missing":
        return "the body is missing; send JSON with Content-Type: application/json"
    if isinstance(error.get("input"), bytes):  # not parsed as JSON
        return "the Content-Type is not JSON; send the body with Content-Type: application/json"
    return f"the body is invalid: {error['msg']}"


def _unsupported(error: Mapping[str, Any]) -> str | None:
    """Return why a parameter is not supported; None if it is."""
    if error["type"] == "extra_forbidden":
        return "unknown to this server, which ignores no parameters"
    empty = error["type"] in ("too_long", "string_too_long") and error["ctx"]["max_length"] == 0
    if empty or error["type"] == "none_required":
        return "not supported by this server; omit it"
    return None


def http_error_of(error: Exception) -> HTTPException:
    """Return the response for any error; unexpected errors are logged, not sent."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors(), error.body)
    if isinstance(error, MoefitError):
        kind = next((one for one in type(error).__mro__ if one in _STATUS_OF), None)
        if kind is not None:  # the messages of others, such as CheckpointError, have local paths
            status, code = _STATUS_OF[kind]
            return APIError(status, str(error), code=code)
    _LOG.error("a request failed: %s: %s", type(error).__name__, error)
    return APIError(500, "internal server error; see the server's log")


def _routing_error(request: Request, error: HTTPException) -> HTTPException:
    """Return the response for an unknown path or method."""
    path = request.url.path
    if error.status_code == 404:
        return APIError(404, _unknown_path_message(path), code="unknown_url")
    if error.status_code == 400:  # of FastAPI, where parsing ends with another error than JSON's
        return APIError(
            400,
            "the body cannot be read as JSON: it is nested too deeply, or not in UTF-8",
            code="invalid_json",
        )
    if error.status_code != 405:
        return error
    methods = _allowed_methods(request)
    response = APIError(
        405, f"{path} does not support {request.method}; use {methods}", code="wrong_method"
    )
    response.headers = {"Allow": methods}
    return response


def _unknown_path_message(path: str) -> str:
    """Return a message that names the nearest known path."""
    name = path.removeprefix("/v1").removeprefix("/v1").rstrip("/")
    if name in _ENDPOINTS:
        hint = f"did you mean /v1{name}? A client's base URL must end with a single /v1"
        return f"there is no {path}; {hint}"
    if name in _UNSUPPORTED_ENDPOINTS:
        return f"this server does not have {path}: {_UNSUPPORTED_ENDPOINTS[name]}"
    if path.startswith("/v1/"):
        known = ", ".join(f"/v1{one}" for one in _ENDPOINTS)
        return f"this server does not have {path}; supported OpenAI endpoints: {known}"
    return f"there is no {path}; see /openapi.json for all endpoints"


def _allowed_methods(request: Request) -> str:
    """Return the methods of a path, over all routes."""
    routes = request.app.router.routes
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    found = [
        method
        for method in methods
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes
        )
    ]
    return ", ".join(found)


def install_handlers(app: FastAPI) -> None:
    """Register handlers that return every error in OpenAI's format."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and not isinstance(error, APIError):
            error = _routing_error(request, error)
        return error_response(http_error_of(error))

    for kind in (HTTPException, RequestValidationError, MoefitError, Exception):
        app.add_exception_handler(kind, handle)
