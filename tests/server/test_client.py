"""Client errors: invalid addresses and responses of other servers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moefit.errors import ConfigError
from moefit.server.client import Client, ServerError


class Elsewhere(BaseHTTPRequestHandler):
    """A server that responds to everything, but not in JSON."""

    def do_GET(self) -> None:
        self._say(b"<html>welcome</html>")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(b"data: <html>\n\n")

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("url", ["http://[::1", "http://localhost:http", "localhost:8000", ""])
def test_invalid_address_raises(url: str) -> None:
    with pytest.raises(ConfigError, match="not a server address"):
        Client(url)


def test_non_openai_server_raises(elsewhere: str) -> None:
    client = Client(elsewhere)
    for ask in (lambda: client.get("/v1/memory"), lambda: client.post("/v1/memory", {})):
        with pytest.raises(ServerError, match="OpenAI-compatible server"):
            ask()
    with pytest.raises(ServerError, match="not JSON"):
        list(client.stream("/v1/completions", json.loads("{}")))
