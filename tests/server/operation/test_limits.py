"""Limits per key: requests at once, and tokens per minute."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_http import client_of, error_of, fake_service

from moefit.engine.api import FinishedEvent, TokenEvent
from moefit.server.errors import APIError
from moefit.server.operation.keys import Keys
from moefit.server.operation.limits import KeyLimits, Reservation, TokenBucket

END = FinishedEvent(reason="stop", prompt_tokens=1, completion_tokens=1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limits_of(tmp_path: Path, **limits: int) -> tuple[KeyLimits, Keys, Clock]:
    words = "".join(f", {name}: {value}" for name, value in limits.items())
    (tmp_path / "keys").write_text(f"keys: [{{name: a, key: aa{words}}}, {{name: b, key: bb}}]")
    keys, clock = Keys(None, tmp_path / "keys"), Clock()
    return KeyLimits(keys, clock), keys, clock


def refusal(limits: KeyLimits, *arguments: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        limits.reserve(*arguments)
    return caught.value


def end(reserved: Reservation, requests: int = 1, tokens: int = 0) -> None:
    for _ in range(requests):
        listener = reserved.listener(lambda event: None)
        for _ in range(tokens):
            listener(TokenEvent(token=1))
        listener(END)


def test_requests_at_once(tmp_path: Path) -> None:
    limits, _, _ = limits_of(tmp_path, requests=3)
    first, second = limits.reserve("a", 1, 9), limits.reserve("a", 2, 9)
    refused = refusal(limits, "a", 1, 9)
    assert (refused.status_code, refused.code) == (429, "requests_at_once")
    assert refused.headers == {"Retry-After": "1"}
    limits.reserve("b", 50, 9)
    limits.reserve(None, 50, 9)
    end(first)
    limits.check("a")
    assert refusal(limits, "a", 2, 9).code == "requests_at_once"
    never = refusal(limits, "a", 4, 9)
    assert (never.status_code, never.headers) == (400, None), "waiting does not help"
    end(second, 2)
    limits.reserve("a", 3, 9)
    assert limits.uses()["a"].limited == 3
    limits.check_counts()


def test_requests_that_the_engine_refuses_are_given_back(tmp_path: Path) -> None:
    limits, _, _ = limits_of(tmp_path, requests=4)
    reserved = limits.reserve("a", 4, 1)
    listeners = [reserved.listener(lambda event: None) for _ in range(2)]
    reserved.release_unused(refused=1)  # the second was refused, two were never tried
    assert limits.uses()["a"].running == 1
    listeners[0](END)
    assert limits.uses()["a"].running == 0


def test_prompts_that_are_not_computed_are_not_counted(tmp_path: Path) -> None:
    limits, _, _ = limits_of(tmp_path, tokens_per_minute=600)
    for _ in range(5):
        reserved = limits.reserve("a", 1, 500)
        reserved.listener(lambda event: None)
        reserved.release_unused(refused=1)
    used = limits.uses()["a"]
    assert (used.prompt_tokens, used.accepted, used.running) == (0, 0, 0)
    end(limits.reserve("a", 1, 500))
    assert used.prompt_tokens == 500


def test_tokens_per_minute(tmp_path: Path) -> None:
    limits, _, clock = limits_of(tmp_path, tokens_per_minute=60)
    end(limits.reserve("a", 1, 50), tokens=30)  # 20 more than there are
    refused = refusal(limits, "a", 1, 1)
    assert refused.code == "tokens_per_minute" and refused.headers == {"Retry-After": "21"}
    clock.now = 20.0
    assert refusal(limits, "a", 1, 1).headers == {"Retry-After": "1"}
    clock.now = 21.5
    limits.reserve("a", 1, 1)
    assert limits.uses()["a"].prompt_tokens == 51 and limits.uses()["a"].generated_tokens == 30
    clock.now = 10_000.0
    end(limits.reserve("a", 1, 60))
    assert refusal(limits, "a", 1, 1).code == "tokens_per_minute", "only one minute is saved up"


def test_limits_survive_a_reload(tmp_path: Path) -> None:
    limits, keys, _ = limits_of(tmp_path, tokens_per_minute=60)
    running = limits.reserve("a", 1, 100)
    path = tmp_path / "keys"
    path.write_text(path.read_text().replace("aa", "rotated"))
    keys.reload()
    assert refusal(limits, "a", 1, 1).code == "tokens_per_minute", "a new key is no new bucket"
    path.write_text("keys: [{name: b, key: bb}]")
    keys.reload()
    assert list(limits.uses()) == ["b"]
    end(running, tokens=2)  # of a key that is gone
    assert list(limits.uses()) == ["b"]
    limits.check_counts()


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 100)), max_size=30))
def test_bucket_never_gives_more_than_its_rate(steps: list[tuple[int, float]]) -> None:
    bucket, now, used = TokenBucket(120, 0.0), 0.0, 0
    for tokens, pause in steps:
        now += pause
        bucket.refill(120, now)
        if not bucket.seconds_until_open():
            bucket.level -= tokens
            used += tokens
            assert used - tokens <= 120 + now * 2 + 1e-6
        else:
            bucket.refill(120, now := now + bucket.seconds_until_open() + 1e-6)
            assert not bucket.seconds_until_open()


def test_limits_of_a_server(served, tmp_path: Path) -> None:
    limits, keys, _ = limits_of(tmp_path, requests=2, tokens_per_minute=40)
    headers = {"Authorization": "Bearer aa"}
    with (
        fake_service(served, keys_file=keys.path) as (service, engine),
        client_of(service) as client,
    ):

        def ask(**more: Any) -> Any:
            asked = {"prompt": "import os", "max_tokens": 5, "ignore_eos": True, **more}
            return client.post("/v1/completions", json=asked, headers=headers)

        assert error_of(ask(n=3), 400)["code"] == "too_many_answers"
        engine.full = True
        assert error_of(ask(n=2), 429)["code"] == "queue_full"
        engine.full = False
        assert ask(n=2).status_code == 200, "what was refused was given back"
        assert ask(n=2, max_tokens=50).status_code == 200
        refused = ask()
        assert error_of(refused, 429)["code"] == "tokens_per_minute"
        assert 1 < int(refused.headers["retry-after"]) < 200
        assert service.limits.uses()["a"].running == 0
        assert service.limits.uses()["a"].generated_tokens == 110
    assert limits.uses()["a"].accepted == 0
