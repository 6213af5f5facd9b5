"""New grammars wait in a bounded queue on a thread of their own."""

import asyncio
import threading
from typing import Any

import pytest
from serving_http import client_of, error_of, fake_service

from moefit.engine.structured.grammar import UntriedError
from moefit.errors import QueueFullError
from moefit.serve.model import ServedModel
from moefit.server.structured.trials import GrammarTrials

URL = "/v1/completions"


class Slow:
    """A compiler that waits."""

    def __init__(self) -> None:
        self.go, self.prepared = threading.Event(), []

    def prepare(self, grammar: str, _: Any) -> None:
        assert self.go.wait(20)
        self.prepared.append(grammar)


def test_queue_is_bounded_and_equal_grammars_wait_together() -> None:
    slow = Slow()

    async def ask() -> None:
        trials = GrammarTrials(slow, limit=2)  # type: ignore[arg-type]
        tasks = [asyncio.create_task(trials.prepare(UntriedError(name, []))) for name in "aabab"]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 new schemas"):
            await trials.prepare(UntriedError("c", []))
        tasks[0].cancel()  # the others still get their answer
        slow.go.set()
        await asyncio.gather(*tasks[1:])
        await trials.prepare(UntriedError("c", []))
        trials.close(wait=True)

    asyncio.run(ask())
    assert slow.prepared == ["a", "b", "c"]


def test_trials_hold_up_no_other_request(served: ServedModel, monkeypatch) -> None:
    """Refusals are kept, and prompts that never fit are refused before anything is tried."""
    tried: list[list[str]] = []
    go = threading.Event()

    def fake(grammars: list[str], _: Any) -> list[str]:
        tried.append(grammars)
        assert go.wait(20)
        return ["it is wrong"] * len(grammars)

    monkeypatch.setattr("moefit.engine.structured.grammar.tried", fake)
    with fake_service(served) as (service, _), client_of(service) as client:
        long = {"prompt": "a" * 40, "max_tokens": 10**6, "guided_json": {"const": 1}}
        assert error_of(client.post(URL, json=long), 400)["code"] == "context_length_exceeded"
        assert not tried
        answers: list[Any] = []

        def ask(number: int) -> None:
            body = {"prompt": "a", "guided_json": {"const": number}}
            answers.append(client.post(URL, json=body))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        assert client.post(URL, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        go.set()
        for thread in threads:
            thread.join()
        assert all("it is wrong" in error_of(one, 400)["message"] for one in answers)
        ask(0)
        assert len(tried) == 6 and error_of(answers[-1], 400)["param"] == "guided_json"
