"""Saying no in OpenAI's words: `{"error": {"message", "type", "param", "code"}}`.

Owns how each error becomes a status and that shape; no answer shows a traceback or a path of ours.
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

_LOG = logging.getLogger(__name__)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ENDPOINTS = ("/chat/completions", "/completions", "/models")
_TALK = "ask POST /v1/chat/completions instead"
_NO_VECTORS = "it serves models that write text, and gives no embeddings or scores"
_ELSEWHERE = {
    "/responses": f"OpenAI's Responses API is not part of it; {_TALK}",
    "/messages": f"Anthropic's Messages API is not part of it; {_TALK}",
    "/embeddings": _NO_VECTORS,
    "/rerank": _NO_VECTORS,
    "/score": _NO_VECTORS,
    "/moderations": "it moderates nothing",
    "/images/generations": "it makes no images",
    "/audio/speech": "it makes no sound",
    "/audio/transcriptions": "it hears no sound",
}
"""What clients ask other servers for, and what is said of it here."""
_STATUS_OF: Mapping[type[MoefitError], tuple[int, str]] = {
    RequestTooLargeError: (400, "context_length_exceeded"),
    BudgetTooSmallError: (400, "budget_too_small"),
    ConfigError: (400, "invalid_value"),
    UnsupportedModelError: (400, "unsupported_by_model"),
    QueueFullError: (429, "queue_full"),
    RefusedError: (503, "shutting_down"),
}


class ErrorDetail(BaseModel):
    """What is wrong; `param` names the parameter and `code` the kind, where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 413, 429, 500, 503)
}


class APIError(HTTPException):
    """A request that is not done; `detail` says why, and what would be."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(status, message)
        self.param, self.code = param, code


class PanicError(RuntimeError):
    """A library failed with what is no `Exception`, as a panic in Rust is."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Raise what is no `Exception` as a PanicError, for which everybody is prepared.

    Cancellation and the end of a generator pass: these are no failures.
    """
    try:
        yield
    except (Exception, CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        raise PanicError(f"{type(error).__name__}: {error}") from error


class WithoutPanics:
    """Middleware by which a panic in any endpoint is answered as every other failure is.

    Frameworks handle `Exception` alone, and asyncio ends the event loop at a SystemExit.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        with without_panics():
            await self._app(scope, receive, send)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error; what of a request comes back in it is short and can be written."""
    message, param = _printable(message, 2000), None if param is None else _printable(param, 200)
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _printable(text: str, most: int) -> str:
    """Text that is UTF-8, although JSON may have brought in half characters."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole if len(whole) <= most else f"{whole[:most]}..."


def body_from(refused: HTTPException) -> dict[str, Any]:
    """The JSON of an error, ours or the framework's."""
    param, code = getattr(refused, "param", None), getattr(refused, "code", None)
    return error_body(refused.status_code, str(refused.detail), param, code)


def error_response(refused: HTTPException) -> JSONResponse:
    """The response for an error, ours or the framework's."""
    headers = dict(refused.headers or {})
    if refused.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status_code == 429:
        headers["Retry-After"] = "1"
    return JSONResponse(body_from(refused), refused.status_code, headers)


def from_moefit_error(error: MoefitError) -> APIError:
    """The refusal that an error of the model's side is."""
    kind = next((one for one in type(error).__mro__ if one in _STATUS_OF), None)
    status, code = (500, None) if kind is None else _STATUS_OF[kind]
    return APIError(status, str(error), code=code)


def from_validation_errors(errors: Sequence[Mapping[str, Any]], body: Any = None) -> APIError:
    """Return what pydantic found, in a sentence; never the values themselves.

    Args:
        errors: what it found.
        body: what it was found in, which tells a field's name from that of a union's member.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        why = f"the body is not JSON: {first['ctx']['error']}"
        return APIError(400, why, code="invalid_json")
    if not first["loc"][1:]:
        return APIError(400, _of_body(first), code="invalid_body")
    places = [_place(one, body) for one in errors if one["loc"][1] == first["loc"][1]]
    # Each member of a union has errors of its own: the one that went furthest is meant.
    place = max(places, key=lambda one: (len(one), [n for n in one if isinstance(n, int)]))
    same = [one for one in errors if _place(one, body) == place]
    name = _written(place)
    if (why := _unsupported(same[0])) is not None:
        message = f"unsupported parameter {name!r}: {why}"
        return APIError(400, message, param=name, code="unsupported_parameter")
    code = "missing_parameter" if same[0]["type"] == "missing" else "invalid_value"
    words = list(dict.fromkeys(one["msg"] for one in same))[:4]
    return APIError(400, f"{name}: {'; or '.join(words)}", param=name, code=code)


def _place(error: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Return the fields and indices that lead to an error, without the names of unions' members."""
    steps, place = list(error["loc"][1:]), []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(body, dict) and (step in body or (last and error["type"] == "missing")):
            body = body.get(step)
        elif isinstance(body, list) and isinstance(step, int) and step < len(body):
            body = body[step]
        elif number:  # the first is a field in any case
            continue
        place.append(step)
    return (*place, *error.get("ctx", {}).get("within", ()))


def _written(place: Sequence[int | str]) -> str:
    """Return a place as a program would write it.

    >>> _written(["messages", 2, "content"])
    'messages[2].content'
    """
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in place]
    return "".join(steps).removeprefix(".")


def _of_body(error: Mapping[str, Any]) -> str:
    """What is wrong with all of a body."""
    if error["type"] == "missing":
        return "there is no body; send JSON, with Content-Type: application/json"
    if isinstance(error.get("input"), bytes):  # has not been read as JSON
        return "the body is not said to be JSON; send it with Content-Type: application/json"
    return f"the body is not as documented: {error['msg']}"


def _unsupported(error: Mapping[str, Any]) -> str | None:
    """Why a parameter is none of ours, if it is none; some may be there, with nothing in them."""
    if error["type"] == "extra_forbidden":
        return "this server does not know it, and ignores nothing"
    empty = error["type"] in ("too_long", "string_too_long") and error["ctx"]["max_length"] == 0
    if empty or error["type"] == "none_required":
        return "this server does not do it; leave it out"
    return None


def from_exception(error: Exception) -> HTTPException:
    """The refusal that an error is; what is no fault of the client's is logged instead of told."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestValidationError):
        return from_validation_errors(error.errors(), error.body)
    if isinstance(error, MoefitError):
        refused = from_moefit_error(error)
        if refused.status_code < 500 or refused.code is not None:
            return refused  # others, such as a checkpoint's, name its files
    _LOG.error("a request failed: %s: %s", type(error).__name__, error)
    return APIError(500, "the server failed at this request; its log says why")


def _of_framework(request: Request, error: HTTPException) -> HTTPException:
    """Return what is said of an address or a method that is not there."""
    path = request.url.path
    if error.status_code == 404:
        return APIError(404, _not_there(path), code="unknown_url")
    if error.status_code != 405:
        return error
    methods = _allowed(request)
    said = APIError(
        405, f"{path} is not for {request.method}, but for {methods}", code="wrong_method"
    )
    said.headers = {"Allow": methods}
    return said


def _not_there(path: str) -> str:
    """Return what is nearest to an address that is not there."""
    name = path.removeprefix("/v1").removeprefix("/v1").rstrip("/")
    if name in _ENDPOINTS:
        return f"there is no {path}; is /v1{name} meant? A client's base URL ends with /v1, once"
    if name in _ELSEWHERE:
        return f"this server does not have {path}: {_ELSEWHERE[name]}"
    if path.startswith("/v1/"):
        known = ", ".join(f"/v1{one}" for one in _ENDPOINTS)
        return f"this server does not have {path}; of OpenAI's API it has {known}"
    return f"there is nothing at {path}; /openapi.json lists what there is"


def _allowed(request: Request) -> str:
    """Return the methods that an address is there for, whichever routes they have."""
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
    """Let the application answer every error in this shape."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and not isinstance(error, APIError):
            error = _of_framework(request, error)
        return error_response(from_exception(error))

    for kind in (HTTPException, RequestValidationError, MoefitError, Exception):
        app.add_exception_handler(kind, refuse)
