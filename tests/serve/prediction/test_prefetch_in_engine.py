"""Prefetching while the engine runs many requests: answers are those without it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Heard, ask, greedy, paused, prompts, running
from levels import compiled
from tiny_served import saved, tiny, with_slots
from torch import Tensor

from moefit.engine.api import TokenEvent
from moefit.engine.engine import Engine
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.serve.prediction.prefetch import Prefetcher

BROKEN = 7  # a token whose embedding is not finite
WIDER = {"num_attention_heads": 2, "num_key_value_heads": 2}  # kernels compute heads of 16


@contextmanager
def engine_of(folder: Path, prefetch: str, **how: Any) -> Iterator[Engine]:
    settings = LoadSettings(context=128, memory="4GiB", **how, prefetch=prefetch)  # pyright: ignore[reportArgumentType]
    with load_model(folder, settings) as served:
        served.set_memory(with_slots(served, 4))
        if prefetch == "on":
            for state in prefetcher_of(served)._states:
                for guess in state.guesses:
                    guess.window = 10.0  # every guess is worth a read, however fast the disk
        with running(served, max_concurrency=4, prefill_chunk=6) as engine:
            yield engine
        served.check()


def prefetcher_of(served: ServedModel) -> Prefetcher:
    assert served.prefetching.prefetcher is not None, served.prefetching.obstacle
    return served.prefetching.prefetcher


def answers(engine: Engine, given: list[list[int]]) -> list[tuple[list[int], str]]:
    """Return tokens and reason of requests that begin in the same step."""
    with paused(engine) as go:
        heard = [ask(engine, prompt, greedy(10)) for prompt in given]
        go.set()
        return [(one.wait().tokens, one.end.reason) for one in heard]


def cancelled(engine: Engine) -> None:
    """Run a request that its client cancels after three tokens."""
    handles = []

    def cancel(event: object) -> None:
        if isinstance(event, TokenEvent) and len(heard.tokens) == 3:
            engine.cancel(handles[0])

    heard = Heard(cancel)
    handles.append(engine.submit(prompts([5])[0], greedy(40), heard))
    assert heard.wait().end.reason == "cancelled"


@compiled
@pytest.mark.parametrize(("kv_cache", "horizon"), [("model", 1), ("int8", 4)])
def test_batches_and_cancelled_requests(tmp_path: Path, kv_cache: str, horizon: int) -> None:
    folder = saved(tiny("Olmoe", num_hidden_layers=1 + horizon, **WIDER), tmp_path)
    with engine_of(folder, "off", kv_cache=kv_cache) as engine:
        wanted = answers(engine, prompts())
        assert {reason for _, reason in wanted} == {"length"}
    with engine_of(folder, "on", kv_cache=kv_cache, prefetch_horizon=horizon) as engine:
        assert answers(engine, prompts()) == wanted
        cancelled(engine)
        assert answers(engine, prompts()) == wanted
        report = engine.served.report()
        assert report["prefetches"] > 0 and report["prefetch"]["obstacle"] == ""


def test_states_that_are_not_finite_harm_no_other_request(tmp_path: Path, caplog) -> None:
    model = tiny("Olmoe")
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = float("nan")
    folder = saved(model, tmp_path)
    given = [[3, BROKEN, 4, 5], [11, 12, 13]]
    found = {}
    for setting in ("off", "on"):
        with engine_of(folder, setting) as engine:
            found[setting] = answers(engine, given)
            if setting == "on":
                assert prefetcher_of(engine.served).failure == ""
    assert found["on"] == found["off"]
    assert found["on"][1][1] == "length" and len(found["on"][1][0]) == 10


class Damaged:
    """A predictor that fails."""

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        raise RuntimeError("no such product")


def test_an_error_switches_it_off_and_fails_no_request(tmp_path: Path, caplog) -> None:
    folder = saved(tiny("Olmoe"), tmp_path)
    with engine_of(folder, "off") as engine:
        wanted = answers(engine, prompts([5, 3]))
    with caplog.at_level(logging.WARNING), engine_of(folder, "on") as engine:
        prefetcher_of(engine.served).predictor = Damaged()
        assert answers(engine, prompts([5, 3])) == wanted
        obstacle = engine.served.report()["prefetch"]["obstacle"]
        assert obstacle == "it was switched off after an error (RuntimeError: no such product)"
    warnings = [one for one in caplog.records if "prefetched" in one.message]
    assert len(warnings) == 1
