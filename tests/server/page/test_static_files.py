"""The page's files are served by name only."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serving_http import error_of

from moefit.server import app as pages
from moefit.server.errors import install_handlers


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<p>hello")
    (folder / "main.js").write_text("1")
    (folder / "secret.key").write_text("x")
    (folder / "inner.js").mkdir()
    (folder / "part").mkdir()
    (folder / "part" / "view.js").write_text("2")
    (folder / "part" / "secret.key").write_text("x")
    (tmp_path / "outside.html").write_text("no")
    app = FastAPI()
    install_handlers(app)
    app.include_router(pages.static_router(folder))
    return TestClient(app)


def test_page_and_modules_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.text == "<p>hello"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    script = client.get("/page/main.js")
    assert (script.text, script.headers["content-type"]) == ("1", "text/javascript; charset=utf-8")
    assert client.get("/page/part/view.js").text == "2"
    assert client.head("/").status_code == 200
    assert client.get("/page/index.html").text == "<p>hello"


@pytest.mark.parametrize(
    "name",
    [
        "secret.key",
        "inner.js",
        "part",
        "part/secret.key",
        "../outside.html",
        "part/../../outside.html",
        "%2e%2e%2foutside.html",
        "none.js",
        "",
    ],
)
def test_other_files_are_not_served(client: TestClient, name: str) -> None:
    error_of(client.get(f"/page/{name}"), 404)


def test_server_without_page_works(tmp_path: Path) -> None:
    assert pages.page_files(tmp_path / "nowhere") == {}
