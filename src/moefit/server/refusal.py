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
_OURS: Mapping[type[MoefitError], tuple[int, str]] = {
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


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 413, 429, 500, 503)
}


class Refused(HTTPException):
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


def body_of(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error; what of a request comes back in it is short and can be written."""
    message, param = _writable(message, 2000), None if param is None else _writable(param, 200)
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _writable(text: str, most: int) -> str:
    """Text that is UTF-8, although JSON may have brought in half characters."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole if len(whole) <= most else f"{whole[:most]}..."


def body_for(refused: HTTPException) -> dict[str, Any]:
    """The JSON of an error, ours or the framework's."""
    param, code = getattr(refused, "param", None), getattr(refused, "code", None)
    return body_of(refused.status_code, str(refused.detail), param, code)


def answer(refused: HTTPException) -> JSONResponse:
    """The response for an error, ours or the framework's."""
    headers = dict(refused.headers or {})
    if refused.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status_code == 429:
        headers["Retry-After"] = "1"
    return JSONResponse(body_for(refused), refused.status_code, headers)


def of_ours(error: MoefitError) -> Refused:
    """The refusal that an error of the model's side is."""
    kind = next((one for one in type(error).__mro__ if one in _OURS), None)
    status, code = (500, None) if kind is None else _OURS[kind]
    return Refused(status, str(error), code=code)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """What pydantic found, in a sentence; never the values themselves."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = f"the body is not JSON: {first['ctx']['error']}"
        return Refused(400, why, code="invalid_json")
    place = [str(one) for one in first["loc"][1:]]
    if not place:
        return Refused(400, _of_body(first), code="invalid_body")
    name = place[0]
    if (why := _unsupported(first)) is not None:
        where = ".".join(place)
        message = f"unsupported parameter {where!r}: {why}"
        return Refused(400, message, param=where, code="unsupported_parameter")
    same = dict.fromkeys(one["msg"] for one in errors if list(one["loc"][1:2]) == [name])
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    return Refused(400, f"{name}: {'; or '.join(list(same)[:4])}", param=name, code=code)


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


def of_any(error: Exception) -> HTTPException:
    """The refusal that an error is; what is no fault of the client's is logged instead of told."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestValidationError):
        return of_validation(error.errors())
    if isinstance(error, MoefitError):
        refused = of_ours(error)
        if refused.status_code < 500 or refused.code is not None:
            return refused  # others, such as a checkpoint's, name its files
    _LOG.error("a request failed: %s: %s", type(error).__name__, error)
    return Refused(500, "the server failed at this request; its log says why")


def install(app: FastAPI) -> None:
    """Let the application answer every error in this shape."""

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return answer(of_any(error))

    for kind in (HTTPException, RequestValidationError, MoefitError, Exception):
        app.add_exception_handler(kind, refuse)
