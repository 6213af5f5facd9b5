"""The ASGI application: all endpoints and the static page, behind the access checks.

The page's files are read once at start and found by name alone, so that no request reaches the
file system.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

import moefit
from moefit.server import admin, chat, completions, info
from moefit.server.errors import ERROR_RESPONSES, APIError, WithoutPanics, install_handlers
from moefit.server.middleware import AccessMiddleware, BodyBudget, BodyLimitMiddleware
from moefit.server.service import Service

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "woff2": "font/woff2",
    "txt": "text/plain; charset=utf-8",
}


def page_files(folder: Traversable) -> dict[str, bytes]:
    """What the page is made of, by name; kinds that are not known here are left out."""
    if not folder.is_dir():
        return {}
    known = (one for one in folder.iterdir() if one.name.rpartition(".")[2] in _TYPES)
    return {one.name: one.read_bytes() for one in known if one.is_file()}


def static_router(folder: Traversable | None = None) -> APIRouter:
    """GET / and GET /page/NAME; no part of the API's document."""
    routes = APIRouter(include_in_schema=False)
    found = page_files(folder or files("moefit.server").joinpath("page"))

    def give(name: str) -> Response:
        if name not in found:
            raise APIError(404, "there is no such page")
        kind = _TYPES[name.rpartition(".")[2]]
        return Response(found[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return give("index.html")

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        return give(name)

    return routes


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
        responses=ERROR_RESPONSES,
    )
    install_handlers(app)
    for part in (completions, chat, info, admin):
        app.include_router(part.router(service))
    app.include_router(static_router())
    app.openapi_schema = _without_422(app.openapi())
    settings = service.settings
    app.add_middleware(WithoutPanics)
    bodies = BodyBudget(settings.bodies_bytes)
    app.add_middleware(BodyLimitMiddleware, bodies=bodies, largest=settings.body_bytes)
    app.add_middleware(AccessMiddleware, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have headers of their own, as `x-stainless-os`
        )
    return app
