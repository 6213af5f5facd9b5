"""A simulated server for the page, with models of any shape and faults on request."""

import json
import math
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import moefit

PAGE = Path(moefit.__file__).parent / "server" / "page"
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
MIB = 1 << 20


GOING = {
    "request_id": "req-1", "key": None, "path": "/v1/completions", "seconds": 2.5, "choices": 1,
    "state": "answer", "waits_for": "", "prompt_tokens": 400, "computed_tokens": 417,
    "cached_tokens": 64, "generated_tokens": 17, "max_tokens": 128,
}  # fmt: skip


class Pretender:
    """A simulated served model."""

    def __init__(
        self, layers: int = 8, experts: int = 16, *, slot: int = 96 << 10, mixed=False, auto=False
    ):
        self.chance = random.Random(0)
        self.layers, self.experts, self.slot, self.mixed = layers, experts, slot, mixed
        self.fixed = {
            "process": 240 * MIB,
            "tokenizer": 12 * MIB,
            "weights": max(12 * MIB, layers * experts * slot // 14),
            "kv_cache": 24 * MIB,
            "workspace": 98 * MIB,
            "staging": 4 * slot,
        }
        self.min_bytes = sum(self.fixed.values()) + layers * slot
        self.all_resident_bytes = sum(self.fixed.values()) + layers * experts * slot
        share = layers * experts * slot  # auto: slots are reckoned in int2
        self.all_resident_bytes_in = {
            name: sum(self.fixed.values()) + share * bits // 2
            for name, bits in (("int2", 2), ("int4", 4), ("int6", 6), ("int8", 8), ("native", 16))
            if auto
        }
        self.most = self.all_resident_bytes_in["native"] if auto else self.all_resident_bytes
        self.total: int | None = (self.min_bytes + 2 * self.all_resident_bytes) // 3
        self.mode, self.hits, self.fetches, self.read, self.running = "exact", 0, 0, 0, 0
        self.bound = 0.3
        self.key: str | None = None
        self.fails = False
        self.breaks_after: int | None = None
        self.ends_after: int | None = None
        self.asked: list[str] = []
        self.problems: list[str] = []
        self.changes: list[dict] = []
        self.going: dict[int, dict] = {}
        self.operator = True
        self.happened: list[dict] = []
        self.failed: list[dict] = []
        self.weights = [
            [math.exp(self.chance.gauss(0, 1.1)) for _ in range(experts)] for _ in range(layers)
        ]
        self.format = [
            self.chance.choices(["native", "int8", "int4", "int2"], [1, 3, 5, 2])[0]
            for _ in range(experts)
        ]

    def memory(self) -> dict:
        total = self.most if self.total is None else self.total
        slots = (total - sum(self.fixed.values())) // (self.slot * self.layers)
        slots = min(self.experts, slots)
        self.hits += 40 + self.chance.randrange(20)
        self.fetches += self.chance.randrange(9)
        self.read += self.chance.randrange(9) * self.slot
        blocks = [self._block(layer, slots) for layer in range(self.layers)]
        held = sum(self.fixed.values()) - 31 * MIB + slots * self.layers * self.slot
        return {
            "model": "pretender-8x16", "mode": self.mode, "prefill": "exact",
            "bound": self.bound,
            "budget": {"total": self.total, "context": 4096, **self.fixed, "floor": self.min_bytes,
                       "everything": self.all_resident_bytes, "most": self.most, "host": None},
            "floor": self.min_bytes, "everything": self.all_resident_bytes, "most": self.most,
            "everything_in": self.all_resident_bytes_in,
            "process_bytes": held, "peak_process_bytes": held + 9 * MIB,
            "slot_bytes": slots * self.layers * self.slot, "kv_tokens": 4096,
            "kv_tokens_reserved": 4096, "kv_tokens_most": 9000,
            "kv_tokens_used": 610 * self.running, "blocks": blocks,
            "prefix_cache": {"active": True, "reason": "", "tokens": 1600, "bytes": 9 * MIB,
                             "shared": 32, "queries": 4000, "hits": 3000, "evicted": 64},
            "speculation": {"active": True, "reason": "by ngram", "drafts": 300, "drafted": 1200,
                            "accepted": 900, "plain_steps": 40},
            "requests": {"running": self.running, "waiting": 0},
            "tokens_per_second": 31 + 8 * math.sin(self.hits / 300) + self.chance.random(),
            "latency": {"ttft_p50": 0.082 + self.chance.random() / 90, "ttft_p99": 0.31,
                        "itl_p50": 0.024 + self.chance.random() / 900, "itl_p99": 0.061},
            "counters": {"hits": self.hits, "fetches": self.fetches, "substituted_mass": 0.0,
                         "bytes_read": self.read, "wait_seconds": self.read / 1e8,
                         "swaps": 3, "budget_changes": len(self.changes),
                         "load_failures": {"demand": 1, "background": 7 * len(self.problems)}},
            "problems": self.problems,
        }  # fmt: skip

    def _block(self, layer: int, slots: int) -> dict:
        weights = self.weights[layer]
        for expert in range(self.experts):
            weights[expert] *= math.exp(self.chance.gauss(0, 0.12))
        order = sorted(range(self.experts), key=lambda e: -weights[e] * self.chance.uniform(0.6, 1))
        resident = sorted(order[:slots])
        top = max(weights)
        return {
            "name": f"model.layers.{layer}.mlp", "experts": self.experts, "slots": slots,
            "resident": resident,
            "formats": [
                (self.format[(e * 7 + layer) % self.experts] if self.mixed else "native")
                if e in resident else None for e in range(self.experts)
            ],
            "importance": [weight / top for weight in weights],
        }  # fmt: skip

    def requests(self) -> dict:
        going = [{**GOING, **one, "number": number} for number, one in self.going.items()]
        return {"operator": self.operator, "total": len(going), "requests": going,
                "changes": self.happened, "errors": self.failed}  # fmt: skip

    def cancel(self, number: int) -> dict:
        if number not in self.going:
            raise ValueError(f"no request {number} runs")
        del self.going[number]
        return {"cancelled": number}

    def change(self, body: dict) -> dict:
        total = body.get("bytes", self.total)
        if isinstance(total, str):
            total = int(float(total.lower().removesuffix("mib")) * MIB)
        if total is not None and total < self.min_bytes:
            raise ValueError(f"below the floor; give at least {self.min_bytes} bytes")
        self.total, self.mode = total, body.get("mode", self.mode)
        self.bound = body.get("bound", self.bound)
        self.changes.append(body)
        return self.memory()


class _Handler(BaseHTTPRequestHandler):
    serving: dict[str, Pretender]
    protocol_version = "HTTP/1.1"

    @property
    def model(self) -> Pretender:
        return self.serving["model"]

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.model.asked.append(self.path)
        if self.path == "/v1/memory":
            return self._guarded(self.model.memory)
        if self.path == "/v1/requests":
            return self._guarded(self.model.requests)
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = PAGE / name
        if ".." in name or not file.is_file():
            return self._send(404, b"", "text/plain")
        return self._send(200, file.read_bytes(), KINDS[name.rsplit(".", 1)[1]])

    def do_POST(self):
        self.model.asked.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/memory":
            return self._guarded(lambda: self.model.change(body))
        if self.path == "/v1/requests/cancel":
            return self._guarded(lambda: self.model.cancel(body["number"]))
        return self._stream(body)

    def _guarded(self, answer):
        if self.model.fails:
            return self._json(503, {"error": {"message": "the model is away", "code": 503}})
        if self.model.key and self.headers.get("Authorization") != f"Bearer {self.model.key}":
            return self._json(401, {"error": {"message": "this key is not the server's"}})
        try:
            return self._json(200, answer())
        except ValueError as error:
            return self._json(400, {"error": {"message": str(error)}})

    def _json(self, status, value):
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        model = self.model
        model.running += 1
        try:
            for number in range(body["max_tokens"]):
                if number == model.breaks_after:
                    error = {"message": "a shard could not be read", "code": 500}
                    return self._event({"error": error})
                if number == model.ends_after:
                    return None
                text = "return <b>x</b>\n    " if number % 7 == 6 else f"word{number} "
                self._event({"choices": [{"text": text, "finish_reason": None}]})
                time.sleep(0.02)
            self._event({"choices": [{"text": "", "finish_reason": "length"}]})
            usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": 3}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass
        finally:
            model.running -= 1

    def _event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())


@contextmanager
def pretend(serving: dict[str, Pretender]) -> Iterator[str]:
    """Serve the current `serving["model"]` and yield the address."""
    handler = type("Handler", (_Handler,), {"serving": serving})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
