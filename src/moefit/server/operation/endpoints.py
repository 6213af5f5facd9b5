"""GET /v1/requests and POST /v1/requests/cancel, which the page shows and uses."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, Field

from moefit.server.errors import APIError
from moefit.server.operation.history import Entry
from moefit.server.operation.request_id import Client, client_of
from moefit.server.operation.requests import RequestView
from moefit.server.schema.base import StrictModel
from moefit.server.service import Service


class HistoryEntry(BaseModel):
    """Something that happened, at a time in seconds since 1970; `by` is the name of a key."""

    at: float
    text: str
    by: str | None
    request_id: str | None


class RequestsState(BaseModel):
    """Requests that run or wait, and what happened lately.

    Attributes:
        operator: Whether the client sees all requests; others see those of their own key.
        total: Number of requests that the client may see.
        requests: The first of them, in order of arrival.
        changes: Changes of budget and mode, the latest first; for operators.
        errors: Errors of requests, the latest first; for operators.
    """

    operator: bool
    total: int
    requests: list[RequestView]
    changes: list[HistoryEntry]
    errors: list[HistoryEntry]


class CancelRequest(StrictModel):
    """Which request to cancel: its `number` in GET /v1/requests."""

    number: Annotated[int, Field(ge=1, le=2**53)]


class Cancelled(BaseModel):
    """The number of the request that will end before the next step."""

    cancelled: int


def requests_state(service: Service, client: Client) -> RequestsState:
    """Return what a client may see."""
    requests, total = service.requests.views(client)
    history, all_of_it = service.history, client.operator
    return RequestsState(
        operator=client.operator,
        total=total,
        requests=requests,
        changes=_shown(history.changes()) if all_of_it else [],
        errors=_shown(history.errors()) if all_of_it else [],
    )


def _shown(entries: list[Entry]) -> list[HistoryEntry]:
    return [HistoryEntry(**asdict(one)) for one in entries]


def router(service: Service) -> APIRouter:
    """Return the router of both."""
    routes = APIRouter()

    @routes.get("/v1/requests")
    async def get_requests(request: Request) -> RequestsState:
        """Return the requests that run or wait, and what happened lately."""
        return await service.run_admin(requests_state, service, client_of(request.scope))

    @routes.post("/v1/requests/cancel")
    async def cancel(body: Annotated[CancelRequest, Body()], request: Request) -> Cancelled:
        """Cancel a request, which then ends with the error `cancelled_by_operator`."""
        if not service.requests.cancel(body.number, client_of(request.scope)):
            raise APIError(
                404,
                f"no request {body.number} of yours runs or waits; GET /v1/requests lists them",
                code="no_such_request",
            )
        return Cancelled(cancelled=body.number)

    return routes
