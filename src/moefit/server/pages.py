"""The page's files: read once, found by name alone, so that no request reaches the file system."""

from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Response

from moefit.server.refusal import Refused

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


def router(folder: Traversable | None = None) -> APIRouter:
    """GET / and GET /page/NAME; no part of the API's document."""
    routes = APIRouter(include_in_schema=False)
    found = page_files(folder or files("moefit.server").joinpath("page"))

    def give(name: str) -> Response:
        if name not in found:
            raise Refused(404, "there is no such page")
        kind = _TYPES[name.rpartition(".")[2]]
        return Response(found[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return give("index.html")

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        return give(name)

    return routes
