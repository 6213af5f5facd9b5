"""Changes of the KV cache's size that fail: no memory, small budgets, cancelled requests."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from threading import Event as Flag
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from engines import Heard, ask, greedy, paused, running
from quick import slow_but
from tiny_served import saved, tiny

from moefit.engine import kv_pool
from moefit.engine.context import growth, reservation
from moefit.engine.engine import Engine
from moefit.engine.kv_pool import KvPool
from moefit.engine.runners import VarlenRunner
from moefit.errors import BudgetTooSmallError, RefusedError, RequestTooLargeError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

CONTEXT, LONG = 128, 600
WANTED = [(20, 1, 30), (90, 2, 8), (200, 3, 20), (400, 4, 8), (LONG, 5, 8)]  # length, seed, answer
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_experts": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """16 experts of 384 KiB in each of 2 layers, and 2 KiB of keys and values a token."""
    return saved(tiny("Olmoe", **SHAPE), tmp_path_factory.mktemp("growth"))


class Memory:
    """The system's memory for keys and values, of which `left` more tensors can be had."""

    def __init__(self):
        self.left, self._given = 1 << 30, kv_pool.host_bytes

    def __call__(self, size: int) -> torch.Tensor:
        if self.left <= 0:
            raise OSError("no memory")
        self.left -= 1
        return self._given(size)


@pytest.fixture
def memory(monkeypatch) -> Memory:
    monkeypatch.setattr(kv_pool, "host_bytes", found := Memory())
    monkeypatch.setattr(growth, "RETRY_AFTER", 0.2)
    monkeypatch.setattr(reservation, "GIVE_BACK_AFTER", 0.3)
    return found


@contextmanager
def engine_with(folder: Path, **settings: Any) -> Iterator[tuple[Engine, ServedModel]]:
    how = LoadSettings(context=CONTEXT, step_tokens=144, kv_cache=settings.pop("kv_cache", "model"))
    with load_model(folder, how) as served:
        served.model.generation_config.eos_token_id = None
        served.set_memory(served.budget.total_for_slots([14] * len(served.blocks)))
        with running(served, **settings) as engine:
            yield engine, served
        served.check()


def text(length: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 17 + at * at * 31 + at * 7) % 55 for at in range(length)]


def asked(engine: Engine, length: int, seed: int = 0, tokens: int = 8) -> Heard:
    return ask(engine, text(length, seed), greedy(tokens))


def until(condition: Any, seconds: float = 60.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        sleep(0.02)


def slots_of(served: ServedModel) -> int:
    return sum(served.report()["slots"].values())


def pool_of(engine: Engine) -> KvPool:
    assert isinstance(engine._runner, VarlenRunner)
    return engine._runner.cache.pool


@pytest.mark.parametrize("left", [0, 3])  # then what was copied cannot be copied back
def test_growth_without_memory(folder, memory, left) -> None:
    """The request ends with an error, slots stay or return, and the engine goes on."""
    with engine_with(folder) as (engine, served):
        before, place = slots_of(served), pool_of(engine).bytes_per_place
        memory.left = left
        heard = asked(engine, LONG)
        assert heard.end.reason == "error" and heard.end.code == "context_length_exceeded"
        engine.check()
        assert engine.stats().kv_tokens == CONTEXT and pool_of(engine).bytes_per_place == place
        assert served.budget.context == pool_of(engine).held, "charged with what it takes"
        assert (served.budget.context == CONTEXT) == (left == 0)
        assert asked(engine, 90).end.reason == "length"
        memory.left = 1 << 30
        until(lambda: served.budget.context == CONTEXT and slots_of(served) == before)
        sleep(growth.RETRY_AFTER)
        assert asked(engine, LONG).end.reason == "length"


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("kv_cache", ["model", "int8"])
def test_giving_back_without_memory(folder, memory, left, kv_cache) -> None:
    """The cache counts on no more places than it has, is charged with its memory, and retries."""
    with engine_with(folder, kv_cache=kv_cache, prefix_cache="on") as (engine, served):
        before = slots_of(served)
        known = asked(engine, LONG)
        assert known.end.reason == "length"
        grown, memory.left = engine.stats().kv_tokens, left
        until(lambda: engine.stats().kv_tokens == CONTEXT)
        assert served.budget.context == pool_of(engine).held == grown
        engine.check()
        others = [asked(engine, 90, seed) for seed in range(4)]
        assert {one.end.reason for one in others} == {"length"}, "one after the other"
        memory.left = 1 << 30
        until(lambda: served.budget.context == CONTEXT and slots_of(served) == before)
        engine.check()
        again = asked(engine, LONG)
        assert (again.end.reason, again.tokens) == ("length", known.tokens)


def test_slots_that_cannot_return(folder, memory, monkeypatch) -> None:
    """The cache is smaller all the same, and slots return once they can."""
    with engine_with(folder) as (engine, served):
        before, change, refused = slots_of(served), served.change_budget, list[int]()

        def fails(change_of: Any) -> Any:
            if (wanted := change_of(served.budget)).context == CONTEXT and len(refused) < 2:
                refused.append(wanted.context)
                raise OSError("no memory")
            return change(change_of)

        monkeypatch.setattr(served, "change_budget", fails)
        assert asked(engine, LONG).end.reason == "length"
        until(lambda: slots_of(served) == before)
        assert len(refused) == 2 and pool_of(engine).held == served.budget.context == CONTEXT
        engine.check()


def test_a_budget_that_stays_too_small_changes_nothing(folder) -> None:
    with engine_with(folder, prefix_cache="on") as (engine, _):
        least = engine.least_memory()
        asked(engine, LONG).wait()
        grown = engine.stats().kv_tokens
        for size in (least - 1, 1):
            with pytest.raises(BudgetTooSmallError):
                engine.set_memory(size)
        assert engine.stats().kv_tokens == grown > LONG
        assert asked(engine, LONG).end.cached_tokens == 592, "prefixes are still there"


def test_a_smaller_budget_is_in_force_though_the_cache_cannot_shrink(folder, memory) -> None:
    with engine_with(folder) as (engine, served):
        asked(engine, LONG).wait()
        total, memory.left = served.budget.min_bytes + (1 << 20), 0
        assert engine.set_memory(total).total == total
        engine.check()
        memory.left = 1 << 30
        until(lambda: served.budget.context == CONTEXT)
        assert served.budget.total == total


def test_cancelled_while_others_wait_for_the_room(folder, memory) -> None:
    """Of three requests that fit only one after the other, those left run in order."""
    with engine_with(folder, context_max=700) as (engine, _):
        with paused(engine) as go:
            heard = [Heard() for _ in range(3)]
            names = [
                engine.submit(text(LONG, seed), greedy(8), one) for seed, one in enumerate(heard)
            ]
            engine.cancel(names[1])
            go.set()
        assert [one.end.reason for one in heard] == ["length", "cancelled", "length"]
        running_one = asked(engine, LONG, tokens=90)
        waiting = asked(engine, LONG, 1)
        until(lambda: len(running_one.tokens) > 2)
        assert not waiting.tokens and engine.stats().waiting == 1
        engine.cancel(next(iter(engine.progress())))
        assert running_one.end.reason == "cancelled" and waiting.end.reason == "length"


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize("speculate", ["off", "ngram"])
def test_everything_in_any_order(folder, memory, seed, speculate) -> None:
    """Requests, cancellations, budgets and failing memory: each answer is right or an error."""
    with engine_with(folder) as (engine, _):
        known = [asked(engine, *one).wait().tokens for one in WANTED]
    how = {"prefix_cache": "on", "speculate": speculate, "max_concurrency": 4}
    with engine_with(folder, **how) as (engine, served):
        sent = list(storm(engine, memory, Random(seed), served.budget.max_bytes))
        memory.left = 1 << 30
        for number, heard in sent:
            if heard.end.reason == "length":
                assert heard.tokens == known[number]
            elif heard.end.reason == "error":
                assert heard.end.code == "context_length_exceeded", heard.end
        assert any(heard.end.reason == "length" for _, heard in sent)
        until(lambda: engine.stats().kv_tokens == served.budget.context == CONTEXT)


def storm(engine: Engine, memory: Memory, chance: Random, most: int) -> Iterator[tuple[int, Heard]]:
    """Yield requests by their number in `WANTED`, amid everything that may disturb them."""
    for _ in range(60):
        act = chance.random()
        if act < 0.6:
            number, heard = chance.randrange(len(WANTED)), Heard()
            length, seed, tokens = WANTED[number]
            with suppress(RequestTooLargeError):  # in the budget of this moment
                name = engine.submit(text(length, seed), greedy(tokens), heard)
                yield number, heard
                if chance.random() < 0.2:
                    sleep(chance.random() / 20)
                    engine.cancel(name)
            if chance.random() < 0.1:
                until(lambda: not engine.stats().running and not engine.stats().waiting)
        elif act < 0.8:
            with suppress(BudgetTooSmallError, OSError):
                engine.set_memory(chance.randint(engine.least_memory(), most))
        else:
            memory.left = chance.choice([0, 1, 2, 3, 1 << 30, 1 << 30])
        engine.check()


def test_last_step_of_a_closing_engine_keeps_its_places(folder, memory, monkeypatch) -> None:
    """A budget from another thread would take away the places that the step still writes to."""
    del memory
    with engine_with(folder) as (engine, served):
        assert asked(engine, LONG).end.reason == "length"
        entered, go, step = Flag(), Flag(), engine._runner.step

        def hold(inputs: Any) -> torch.Tensor:
            entered.set()
            assert go.wait(60)
            return step(inputs)

        monkeypatch.setattr(engine._runner, "step", hold)
        heard = asked(engine, LONG, 1)
        assert entered.wait(30)
        grown, total = pool_of(engine).held, served.budget.total
        assert grown > CONTEXT and not engine.close(timeout=0.1)
        assert heard.end.reason == "cancelled"
        small = served.budget.total_for_slots([4] * len(served.blocks))
        try:
            with pytest.raises(RefusedError, match="last step still runs"):
                engine.set_memory(small)
            assert pool_of(engine).held == grown and served.budget.total == total
        finally:
            go.set()
        assert engine.close() and pool_of(engine).held == CONTEXT
        engine.set_memory(small)  # nothing computes any more
        assert served.budget.total == small
