"""Errors that are not `Exception`s, such as panics in Rust, fail only their own request."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
import torch
from engines import Heard, ask, engine_of, greedy, paused, prompts
from serving_http import client_of, error_of, events, fake_service
from tiny_served import MemoryStore, mixtral_block, saved, tiny

import moefit
from moefit.engine.api import Event, FinishedEvent, TokenEvent
from moefit.engine.prefix.tree import Prefix
from moefit.engine.request_state import TextDecoding
from moefit.errors import RefusedError
from moefit.quant.format import NATIVE
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.io.loads import Transfer, wait_for_load
from moefit.serve.model import ServedModel
from moefit.server.client import Client, ServerError
from tests.server.test_http_server import soon

PROMPT = prompts([5])[0]


class Panic(BaseException):
    """Like pyo3's PanicException, not an Exception."""


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory) -> Path:
    return saved(tiny("Olmoe"), tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with moefit.load("reference") as served:
        yield served


def panics(*_: Any, **__: Any) -> Any:
    raise Panic("the regex gave up")


class Panicking:
    """A tokenizer whose decoder panics at one token, or at every text that is not empty."""

    def __init__(self, unknown: int | None = None):
        self.unknown, self.added_tokens_decoder = unknown, {}

    def decode(self, tokens: list[int], **_: bool) -> str:
        if self.unknown in tokens or (self.unknown is None and tokens):
            panics()
        return "".join(f"{token} " for token in tokens)


def speak(engine: Any, tokenizer: Any) -> None:
    decoding = TextDecoding(tokenizer=tokenizer, eos_ids=frozenset(), decoder_only=False)
    engine._limits = replace(engine._limits, decoding=decoding)


def test_detokenizer_panic_fails_only_its_request(olmoe) -> None:
    with engine_of(olmoe, slots=None) as engine:
        usual = [ask(engine, prompt, greedy(8)).wait().tokens for prompt in prompts([5, 8])]
        (unknown, *_) = set(usual[0]) - set(usual[1])
        speak(engine, Panicking(unknown))
        with paused(engine) as go:
            bad, good = (ask(engine, prompt, greedy(8)) for prompt in prompts([5, 8]))
            go.set()
            assert bad.end.reason == "error" and "the regex gave up" in bad.end.message
            assert (good.end.reason, good.tokens) == ("length", usual[1])
        assert engine.failure is None


def test_panic_at_end_of_text_still_ends_request(olmoe) -> None:
    tokenizer = Panicking(unknown=-1)

    def break_it(event: Event) -> None:
        tokenizer.unknown = None if isinstance(event, TokenEvent) else -1

    with engine_of(olmoe, slots=None) as engine:
        speak(engine, tokenizer)
        heard = Heard(break_it)
        engine.submit(PROMPT, greedy(1), heard)
        assert heard.end.reason == "error" and "gave up" in heard.end.message


@pytest.mark.parametrize("kind", [Panic, SystemExit, KeyboardInterrupt])
def test_step_panic_fails_only_its_requests(olmoe, monkeypatch, kind) -> None:
    with engine_of(olmoe, slots=None) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "step", lambda inputs: (_ for _ in ()).throw(kind("no")))
            assert ask(engine, PROMPT, greedy(3)).end.reason == "error"
        assert ask(engine, PROMPT, greedy(3)).end.reason == "length"


def test_panic_at_start_fails_only_that_request(olmoe, monkeypatch) -> None:
    with engine_of(olmoe, slots=None, max_concurrency=4) as engine:
        opened = engine._runner.open

        def open_small(name: str, tokens: int, prefix: Prefix | None) -> int:
            return opened(name, tokens, prefix) if tokens < 20 else panics()

        monkeypatch.setattr(engine._runner, "open", open_small)
        with paused(engine) as go:
            good, bad = ask(engine, PROMPT, greedy(3)), ask(engine, PROMPT, greedy(30))
            go.set()
        assert (good.end.reason, bad.end.reason) == ("length", "error")


def test_failed_release_still_sends_last_event(olmoe, monkeypatch) -> None:
    with engine_of(olmoe, slots=None) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "close", panics)
            assert ask(engine, PROMPT, greedy(2)).end.reason == "length"
        engine.check()


def test_listener_panic_does_not_affect_others(olmoe) -> None:
    with engine_of(olmoe, slots=None) as engine:
        engine.submit(PROMPT, greedy(3), panics)
        assert ask(engine, PROMPT, greedy(3)).end.reason == "length"


def test_command_panic_raises_in_caller(olmoe) -> None:
    with engine_of(olmoe, slots=None) as engine:
        with pytest.raises(Panic):
            engine.between_steps(panics)
        assert ask(engine, PROMPT, greedy(3)).end.reason == "length"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_engine_thread_fails_all_requests(olmoe, monkeypatch, caplog) -> None:
    """The error handling itself fails."""
    with engine_of(olmoe, slots=None) as engine:
        monkeypatch.setattr(engine, "_iterate", panics)
        monkeypatch.setattr("moefit.engine.engine._LOG.exception", panics)
        with caplog.at_level(logging.CRITICAL):
            heard = ask(engine, PROMPT, greedy(3))
            assert heard.end.reason == "error" and "gave up" in heard.end.message
            engine._thread.join(10)
        assert engine.failure is not None and "the engine's thread ended" in caplog.text
        with pytest.raises(RefusedError, match="restart the process"):
            engine.submit(PROMPT, greedy(3), lambda event: None)
        with pytest.raises(RefusedError, match="restart the process"):
            engine.set_memory(None)
        assert engine.drain(1) and engine.close()


def test_closing_does_not_wait_for_hung_step(olmoe, monkeypatch) -> None:
    go = Flag()
    with engine_of(olmoe, slots=None) as engine:
        monkeypatch.setattr(engine._runner, "step", lambda inputs: go.wait(30))
        heard = ask(engine, PROMPT, greedy(3))
        soon(lambda: engine.stats().running == 1)
        assert not engine.close(timeout=0.1)
        assert heard.end.reason == "cancelled"
        go.set()
        assert engine.close()


@pytest.mark.parametrize("background", [False, True])
def test_source_panic_raises_in_waiter(background: bool) -> None:
    block, module = mixtral_block()
    store = MemoryStore(block, module)
    store.broken, store.error = {0}, Panic("the regex gave up")
    transfer = Transfer(store, readers=1)
    loads: list[Future[float]] = []
    for _ in range(3):  # the thread goes on
        slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
        loads.append(transfer.load(block.name, 0, slot, background=background))
        with pytest.raises(Panic):
            wait_for_load(loads[-1])
    transfer.close()


def test_health_reports_failed_engine(served) -> None:
    with fake_service(served) as (service, engine), client_of(service) as client:
        engine.failure = "MemoryError: /srv/models/x"
        error = error_of(client.get("/health"), 503)
        assert error["code"] == "engine_failed" and "/srv" not in error["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_tokenizer_panic_is_openai_error(served, monkeypatch, path) -> None:
    with (
        fake_service(served) as (service, _),
        client_of(service, raise_server_exceptions=False) as client,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(service.tokenizer, "ids", panics)
            error = error_of(client.post(path, json={"prompt": "a"}), 500)
            assert "the server's log" in error["message"]
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_stream_panic_ends_with_error_event(served, monkeypatch) -> None:
    with fake_service(served) as (service, _), client_of(service) as client:
        monkeypatch.setattr(service.tokenizer, "name", panics)
        asked = {"prompt": "a", "max_tokens": 3, "logprobs": 1, "stream": True}
        last = events(client.post("/v1/completions", json=asked))[-1]
        assert last["error"]["type"] == "server_error"


def test_failed_metrics_do_not_block_events(served, monkeypatch) -> None:
    with fake_service(served) as (service, _), client_of(service) as client:
        monkeypatch.setattr(service.telemetry.whole, "observe", panics)
        heard: list[Any] = []
        listener = service.telemetry.wrap_listener(heard.append)
        with pytest.raises(Panic):
            listener(FinishedEvent(reason="stop", prompt_tokens=1, completion_tokens=0))
        assert len(heard) == 1
        assert client.get("/health").status_code == 200


SERVE = """
import time
import moefit.cli.serve as cli
from moefit.engine import engine
from moefit.cli.app import app
def fail(*_, **__):
    raise SystemError("gave up")
def turn(self):
    self._commands.run_all()
    if self._requests:
        {turn}
engine.Engine._iterate = turn
cli.LEAVING = 3.0
app(["serve", "--port", "0", "--drain-seconds", "1"])
"""


@contextmanager
def serving(turn: str) -> Iterator[tuple[subprocess.Popen[str], Future[str]]]:
    """Start a server in its own process and submit one request."""
    words = [sys.executable, "-c", SERVE.replace("{turn}", turn)]
    with (
        subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(1) as threads,
    ):
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("API at "))
            yield process, threads.submit(_complete, line.split()[2].removesuffix("/v1"))
        finally:
            process.kill()


def _complete(url: str) -> str:
    try:
        return str(Client(url).post("/v1/completions", {"prompt": "a", "max_tokens": 2}))
    except ServerError as error:
        return str(error)


@pytest.mark.slow
def test_sigterm_ends_server_with_hung_step() -> None:
    with serving("with self.served._shared.lock: time.sleep(999)") as (process, answer):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1 and "not all work ended within 3 s" in said
        assert "was cancelled" in answer.result(5)


def test_server_with_failed_engine_responds_and_exits() -> None:
    with serving("engine._LOG.exception = fail; fail()") as (process, answer):
        assert "the model failed" in answer.result(60)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1 and "the engine failed and cannot go on" in said
