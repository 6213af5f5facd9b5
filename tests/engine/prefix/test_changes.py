"""Changes of the mode while requests run: what they compute is used by no other request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from engines import Heard, ask, greedy, paused, running, text
from levels import compiled
from tiny_served import saved, tiny

from moefit.api import load as load_by_name
from moefit.engine.api import TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.prefix.reuse import uniform_formats
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model

pytestmark = compiled
PROMPT = text(180)


@pytest.fixture(scope="module")
def served():
    """Return a model with two experts per block in memory, so that modes differ."""
    with load_by_name("reference", context=1024, dtype=torch.bfloat16) as served:
        served.model.generation_config.eos_token_id = None
        slots = sum(block.slot_bytes for block in served.budget.blocks) * 2
        served.set_memory(served.budget.fixed + slots + (8 << 20))
        yield served


@pytest.fixture(scope="module")
def expected(served) -> list[float]:
    with running(served, prefix_cache="off") as engine:
        return bits(asked(engine).wait())


def asked(engine: Engine) -> Heard:
    return ask(engine, PROMPT, greedy(8, logprobs=0))


def bits(heard: Heard) -> list[float]:
    made = [event for event in heard.events if isinstance(event, TokenEvent)]
    assert made and heard.end.reason == "length"
    return [number for event in made for number in (event.token, event.logprob.logprob)]


@contextmanager
def before_steps(engine: Engine, acts: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Call functions before the steps of these numbers."""
    step, steps = engine._runner.step, []

    def counting(inputs):
        steps.append(len(inputs))
        acts.get(len(steps), lambda: None)()
        return step(inputs)

    engine._runner.step = counting
    yield
    engine._runner.step = step
    assert len(steps) >= max(acts)


def test_what_was_computed_in_several_modes_is_not_reused(served, expected, tmp_path) -> None:
    modes = {3: lambda: served.set_mode("virtual"), 11: lambda: served.set_mode("exact")}
    with running(served, prefix_folder=tmp_path, prefill_chunk=16) as engine:
        with before_steps(engine, modes):
            assert bits(asked(engine).wait()) != expected
        assert engine._prefixes.settle(10) and engine.stats().prefix_files.written == 0
        again = asked(engine).wait()
        assert again.end.cached_tokens == 32, "two steps were computed before the change"
        assert bits(again) == expected
    with running(served, prefix_folder=tmp_path) as engine:
        again = asked(engine).wait()
        assert again.end.cached_tokens == 128 and bits(again) == expected


def test_formats_that_change_between_steps_are_not_written(tmp_path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 128}
    folder = saved(tiny("Mixtral", dtype=torch.bfloat16, **wide), tmp_path / "model")
    settings = LoadSettings(precision="auto", memory="4GiB", context=256)
    with load_model(folder, settings) as served:
        assert served.adapts_precision and uniform_formats(served), "equal at the moment"
        with running(served, prefix_folder=tmp_path / "c", prefix_cache="on") as engine:
            for cached in (0, 64):
                assert ask(engine, text(80), greedy(8)).wait().end.cached_tokens == cached
            assert engine._prefixes.settle(10) and engine.stats().prefix_files.written == 0


def test_requests_that_wait_go_on_when_the_mode_changes(served, expected) -> None:
    modes = {4: lambda: served.set_mode("virtual"), 6: lambda: served.set_mode("exact")}
    with running(served, prefill_chunk=16) as engine:
        with before_steps(engine, modes), paused(engine) as go:
            three = [asked(engine) for _ in range(3)]
            go.set()
            assert {one.wait().end.reason for one in three} == {"length"}
        engine.check()
        assert [one.end.cached_tokens for one in three] == [0, 0, 0]
        again = asked(engine).wait()
        assert again.end.cached_tokens <= 48 and bits(again) == expected
