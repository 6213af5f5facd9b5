"""The application: all endpoints, behind the gate. Owns how they are put together."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware

import moefit
from moefit.server import about, chat, completions, operator, pages
from moefit.server.bodies import Bodies, BodiesInFlight
from moefit.server.refusal import REFUSALS, WithoutPanics, install
from moefit.server.security import Gate
from moefit.server.service import Service

_ABOUT = """OpenAI's API for one mixture-of-experts model, served inside a memory budget.

Parameters that are not documented here are refused, not ignored."""


def _without_422(document: dict[str, Any]) -> dict[str, Any]:
    """The document without FastAPI's own answer to invalid requests, which is 400 here."""
    for operation in (one for path in document["paths"].values() for one in path.values()):
        operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; has no state but the service's."""
    app = FastAPI(
        title="moefit",
        version=moefit.__version__,
        description=_ABOUT,
        docs_url=None,  # these two pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=REFUSALS,
    )
    install(app)
    for part in (completions, chat, about, operator):
        app.include_router(part.router(service))
    app.include_router(pages.router())
    app.openapi_schema = _without_422(app.openapi())
    settings = service.settings
    app.add_middleware(WithoutPanics)
    app.add_middleware(BodiesInFlight, bodies=Bodies(settings.bodies_bytes))
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.body_bytes)
    app.add_middleware(Gate, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have headers of their own, as `x-stainless-os`
        )
    return app
