"""ASGI application: all endpoints and the static page, behind the access checks.

The page's files are read once at start and looked up by name, so that no request reaches the file
system.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

import moefit
from moefit.server import admin, chat, completions
from moefit.server.errors import ERROR_RESPONSES, APIError, PanicMiddleware, install_handlers
from moefit.server.middleware import AccessMiddleware, BodyBudget, BodyLimitMiddleware
from moefit.server.operation import endpoints
from moefit.server.operation.request_id import HEADER, RequestIdMiddleware
from moefit.server.responses import endpoint as responses
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
    """Return the page's files by their paths in the folder; unknown file types are ignored."""
    if not folder.is_dir():
        return {}
    found: dict[str, bytes] = {}
    for one in folder.iterdir():
        if one.is_dir():
            inner = page_files(one)
            found |= {f"{one.name}/{name}": content for name, content in inner.items()}
        elif one.name.rpartition(".")[2] in _TYPES:
            found[one.name] = one.read_bytes()
    return found


def static_router(folder: Traversable | None = None) -> APIRouter:
    """Return the router with GET / and GET /page/NAME, which are not part of the API schema."""
    routes = APIRouter(include_in_schema=False)
    found = page_files(folder or files("moefit.server").joinpath("page"))

    def file_response(name: str) -> Response:
        if name not in found:
            raise APIError(404, "page not found")
        kind = _TYPES[name.rpartition(".")[2]]
        return Response(found[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return file_response("index.html")

    @routes.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        return file_response(name)

    return routes


_DESCRIPTION = """OpenAI's API for one mixture-of-experts model, served inside a memory budget.

Undocumented parameters are rejected, not ignored."""


def _remove_422(document: dict[str, Any]) -> dict[str, Any]:
    """Remove FastAPI's response for invalid requests, which return 400 here."""
    for operation in (one for path in document["paths"].values() for one in path.values()):
        operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def create_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service."""
    app = FastAPI(
        title="moefit",
        version=moefit.__version__,
        description=_DESCRIPTION,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    install_handlers(app)
    routers = (
        completions.router,
        chat.router,
        responses.router,
        admin.model_router,
        admin.status_router,
        admin.memory_router,
        endpoints.router,
    )
    for made in (*(router(service) for router in routers), static_router()):
        app.include_router(made)
    app.openapi_schema = _remove_422(app.openapi())
    settings = service.settings
    app.add_middleware(PanicMiddleware)
    bodies = BodyBudget(settings.bodies_bytes)
    app.add_middleware(BodyLimitMiddleware, bodies=bodies, max_body_size=settings.body_bytes)
    app.add_middleware(
        AccessMiddleware,
        settings=settings,
        keys=service.keys,
        leaving=lambda: service.leaving,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send custom headers such as `x-stainless-os`
            expose_headers=[HEADER, "retry-after"],
        )
    app.add_middleware(RequestIdMiddleware, failed=service.history.failed)
    return app
