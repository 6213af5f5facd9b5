"""The KV cache grows for requests that need it, in memory of experts, and gives it back."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engines import Heard, ask, greedy, paused, running
from levels import compiled
from planned import planned_model
from tiny_families import tiny_family
from tiny_served import saved, tiny

from moefit.cli.serve import FollowSettings
from moefit.engine.api import EngineSettings, TokenEvent
from moefit.engine.context import growth, reservation
from moefit.engine.engine import Engine
from moefit.errors import BudgetTooSmallError, ConfigError, RequestTooLargeError
from moefit.serve.config import BlockPlacement, LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.server.service import Service

POSITIONS, CONTEXT, LONG = 1024, 128, 600
MIB = 1 << 20
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_experts": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": POSITIONS,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """16 experts of 384 KiB in each of 2 layers, and 2 KiB of keys and values a token."""
    return saved(tiny("Olmoe", **SHAPE), tmp_path_factory.mktemp("growth"))


@pytest.fixture
def soon(monkeypatch) -> None:
    monkeypatch.setattr(reservation, "GIVE_BACK_AFTER", 0.3)


def text(length: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 17 + at * at * 31 + at * 7) % 55 for at in range(length)]


@contextmanager
def budgeted(
    folder: Path, *, slots: int = 14, context: int = CONTEXT, **how: Any
) -> Iterator[ServedModel]:
    with load_model(folder, LoadSettings(context=context, step_tokens=144, **how)) as served:
        served.model.generation_config.eos_token_id = None
        served.set_memory(served.budget.total_for_slots([slots] * len(served.blocks)))
        yield served
        served.check()


def slots_of(served: ServedModel) -> int:
    return sum(served.report()["slots"].values())


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        sleep(0.02)


def bits(heard: Heard) -> list[float]:
    made = [event for event in heard.wait().events if isinstance(event, TokenEvent)]
    assert heard.end.reason == "length", heard.end
    known = [event.logprob for event in made if event.logprob is not None]
    assert len(known) == len(made)
    return [number for one in known for number in (one.token, one.logprob)]


def asked(engine: Engine, length: int, seed: int = 0, tokens: int = 8) -> Heard:
    return ask(engine, text(length, seed), greedy(tokens, logprobs=0))


def expected(folder: Path, wanted: Sequence[tuple[int, int]], **how: Any) -> list[list[float]]:
    """Return bits of answers with a KV cache that is large from the start."""
    with budgeted(folder, context=POSITIONS, **how) as served, running(served) as engine:
        assert engine.stats().kv_tokens == POSITIONS
        return [bits(asked(engine, *one)) for one in wanted]


@pytest.mark.parametrize("kv_cache", ["model", "int8"])
def test_long_prompt_is_answered_and_slots_return(folder, kv_cache, soon) -> None:
    (known,) = expected(folder, [(LONG, 0)], kv_cache=kv_cache)
    with budgeted(folder, kv_cache=kv_cache) as served:
        before, total = slots_of(served), served.budget.total
        with running(served) as engine:
            load = engine.stats()
            assert load.kv_tokens == load.kv_tokens_reserved == CONTEXT
            assert LONG + 8 <= engine.max_model_len <= load.kv_tokens_most
            assert bits(asked(engine, LONG)) == known
            grown = engine.stats().kv_tokens
            assert LONG + 8 <= grown < LONG + 8 + 16 and served.budget.context == grown
            assert before // 2 <= slots_of(served) < before
            until(lambda: engine.stats().kv_tokens == CONTEXT and slots_of(served) == before)
            assert served.budget.total == total
            engine.check()
            assert bits(asked(engine, LONG)) == known, "a second time"
        assert served.budget.context == CONTEXT, "a closed engine gives all of it back"


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_requests_are_as_before_when_it_grows(folder, dtype) -> None:
    wanted = [(40, 1, 60), (LONG, 2), (15, 3), (300, 4), (20, 5, 40)]
    known = expected(folder, wanted, dtype=dtype)
    with budgeted(folder, dtype=dtype) as served, running(served, max_concurrency=4) as engine:
        first = Heard()
        engine.submit(text(40, 1), greedy(60, logprobs=0), first)
        until(lambda: len(first.tokens) > 3)
        others = [asked(engine, *one) for one in wanted[1:]]
        assert [bits(one) for one in (first, *others)] == known
        assert engine.stats().kv_tokens > LONG


LATENTS = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(
    ("family", "sizes", "kv_cache"),
    [
        ("DeepseekV3", {}, "model"),
        ("DeepseekV3", LATENTS, "model"),
        ("GptOss", {}, "model"),
        ("GptOss", {}, "int8"),
    ],
)
def test_other_forms_of_keys(family, sizes, kv_cache, tmp_path) -> None:
    """Latents are expanded at each step, or by their widths attended to as they are; windows."""
    folder = saved(tiny(family, max_position_embeddings=512, **sizes), tmp_path)
    (known,) = expected_of(folder, 512, kv_cache)
    (grown,) = expected_of(folder, 64, kv_cache)
    assert grown == known


def expected_of(folder: Path, context: int, kv_cache: Any) -> list[list[int]]:
    settings = LoadSettings(context=context, step_tokens=144, memory="4GiB", kv_cache=kv_cache)
    with load_model(folder, settings) as served, running(served) as engine:
        assert engine.stats().kv_tokens == context and engine.max_model_len == 512
        heard = asked(engine, 300)
        assert heard.wait().end.reason == "length"
        return [heard.tokens]


def test_requests_that_wait_make_it_grow(folder) -> None:
    with budgeted(folder) as served, running(served, max_concurrency=4) as engine:
        with paused(engine) as go:
            heard = [asked(engine, 100, seed, 20) for seed in range(5)]
            go.set()
            for one in heard:
                assert one.end.reason == "length"
        assert 4 * 120 <= engine.stats().kv_tokens < 5 * 120


def test_prefixes_survive_growth_and_leave_in_order(folder, soon) -> None:
    with budgeted(folder) as served, running(served, prefix_cache="on") as engine:
        asked(engine, 40, 1).wait()
        asked(engine, 130, 2).wait()
        assert engine.stats().kv_tokens == 160, "a quarter more than it was"
        assert asked(engine, 40, 1).end.cached_tokens == 16, "of 32 tokens those that had room"
        asked(engine, LONG, 3).wait()
        assert asked(engine, LONG, 3).end.cached_tokens == 592
        until(lambda: engine.stats().kv_tokens == CONTEXT)
        kept = engine.stats().prefixes
        assert kept is not None and kept.tokens + kept.shared == CONTEXT
        engine.check()
        assert asked(engine, 100, 3).end.cached_tokens == 96, "the beginning stays"


def test_a_smaller_budget_takes_back_what_is_unused(folder) -> None:
    with budgeted(folder) as served, running(served) as engine:
        least = engine.least_memory()
        asked(engine, LONG).wait()
        assert engine.stats().kv_tokens > LONG and engine.least_memory() == least
        budget = engine.set_memory(least)
        assert (budget.total, budget.context) == (least, CONTEXT)
        assert engine.max_model_len == CONTEXT
        engine.check()
        with pytest.raises(BudgetTooSmallError):
            engine.set_memory(least - 1)


def test_a_budget_too_small_for_what_runs_is_refused(folder) -> None:
    with budgeted(folder) as served, running(served) as engine:
        least, total = engine.least_memory(), served.budget.total
        heard = asked(engine, LONG, tokens=150)
        until(lambda: len(heard.tokens) > 2)
        with pytest.raises(BudgetTooSmallError, match=r"requests that run hold 750 tokens .* 128"):
            engine.set_memory(least)
        assert served.budget.total == total and engine.least_memory() > least
        served.check()
        assert heard.end.completion_tokens == 150


def test_a_request_that_waits_while_the_room_goes_is_ended(folder) -> None:
    with budgeted(folder) as served, running(served) as engine:
        with paused(engine) as go:
            heard = asked(engine, LONG)
            change = engine._commands.submit(
                lambda: engine._growth.set_memory(engine.least_memory())
            )
            go.set()
        change.result(20)
        assert heard.end.reason == "error" and heard.end.code == "context_length_exceeded"
        assert "128 tokens now" in heard.end.message
        assert asked(engine, 100).end.reason == "length"


def test_refusals_say_what_would_make_it_fit(folder) -> None:
    with budgeted(folder, slots=4) as served, running(served) as engine:
        most = engine.max_model_len
        assert CONTEXT < most < 900
        with pytest.raises(RequestTooLargeError) as refused:
            asked(engine, 900, tokens=100)
        words = str(refused.value)
        assert f"are 1,000, but one request holds at most {most}" in words
        found = words.split("it would fit with a budget of at least ")[1].split()[0]
        engine.set_memory(int(found))
        assert asked(engine, 900, tokens=100).end.reason == "length"


def test_an_explicit_bound_may_leave_the_fewest_slots(folder) -> None:
    with budgeted(folder, slots=8) as served:
        with running(served) as engine:
            usual = engine.stats().kv_tokens_most
            with pytest.raises(RequestTooLargeError, match=r"or with --context-max 1008"):
                asked(engine, 1000)
        with running(served, context_max=4096) as engine:
            assert usual < engine.max_model_len == POSITIONS < engine.stats().kv_tokens_most
            assert asked(engine, 1000).end.reason == "length"
            assert slots_of(served) < 8, "half of what they were"
        with (
            running(served, context_max=400) as engine,
            pytest.raises(RequestTooLargeError, match=r"--context-max 400\); .* --context-max"),
        ):
            asked(engine, 500)
        fixed = pytest.raises(RequestTooLargeError, match=r"128 \(the KV cache does not grow")
        with running(served, context_max=CONTEXT) as engine, fixed:
            asked(engine, 300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_max": 100}, "context_max=100 is less than the 128"),
        ({"context_max": 0}, "context_max=0"),
        ({"max_model_len": 1025}, "max_model_len=1,025, but .* hold"),
    ],
)
def test_bounds_that_cannot_be(folder, settings, message) -> None:
    with budgeted(folder) as served, pytest.raises(ConfigError, match=message):
        Engine(served, EngineSettings(**settings))


def test_recurrent_models_and_plans_do_not_grow(tmp_path) -> None:
    recurrent = saved(tiny_family("jamba"), tmp_path / "recurrent")
    with load_model(recurrent, LoadSettings(context=64, memory="4GiB")) as served:
        with running(served) as engine, pytest.raises(RequestTooLargeError, match="one at a time"):
            asked(engine, 100)
        with pytest.raises(ConfigError, match="does not grow: requests of Jamba"):
            Engine(served, EngineSettings(context_max=100))
    planned = saved(planned_model(), tmp_path / "planned")
    with load_model(planned, LoadSettings(context=64)) as served:
        placement = {name: BlockPlacement(slots=4, formats=("native",)) for name in served.blocks}
        served.set_placement(placement, memory="4GiB")
        with running(served) as engine, pytest.raises(RequestTooLargeError, match="by a plan"):
            asked(engine, 100)
    settings = LoadSettings(context=64, memory="4GiB")
    with load_model(planned, settings) as served, running(served) as engine:
        asked(engine, 90).wait()
        with pytest.raises(ConfigError, match="has grown to"):
            engine.between_steps(lambda: served.set_placement(placement, memory="4GiB"))


def test_deterministic_answers_do_not_depend_on_it(folder) -> None:
    settings = LoadSettings(context=CONTEXT, memory="4GiB", precision="auto")
    with load_model(folder, settings) as served, running(served, deterministic=True) as engine:
        assert engine.stats().kv_tokens_most == CONTEXT


@pytest.mark.parametrize("drafting", ["ngram", "draft"])
def test_longer_requests_than_the_drafts_have_room_for(folder, drafting) -> None:
    (known,) = expected(folder, [(LONG, 0)])
    how = {"draft": folder} if drafting == "draft" else {}
    with (
        budgeted(folder, slots=15, **how) as served,
        running(served, speculate=drafting) as engine,
    ):
        assert bits(asked(engine, LONG)) == known
        assert asked(engine, 60, 1, 40).end.reason == "length"


def test_without_a_budget_it_grows_in_what_is_free(folder, monkeypatch) -> None:
    with load_model(folder, LoadSettings(context=CONTEXT, step_tokens=144)) as served:
        with running(served) as engine:
            assert engine.max_model_len == POSITIONS
            assert asked(engine, LONG).end.reason == "length"
            assert slots_of(served) == 32
        monkeypatch.setattr(growth, "available_bytes", lambda: 0)
        none = pytest.raises(RequestTooLargeError, match="no more memory is free")
        with running(served) as engine, none:
            asked(engine, LONG)


def test_following_budgets_leave_room_beside_all_experts_where_they_may(folder) -> None:
    """A largest budget that is given is not lowered to what all experts need."""
    with budgeted(folder) as served, running(served, max_concurrency=16) as engine:

        def most(largest: int | None) -> int:
            follow = FollowSettings(follows=False, least=None, most=largest, headroom=0)
            service = SimpleNamespace(engine=engine)
            follower = follow.follower(cast("Service", service))
            follower.close()
            return follower.rule.most

        whole = served.budget.max_bytes
        assert most(None) == whole and most(whole // 2) < whole
        engine.set_memory(most(None))
        grows_to = engine.stats().kv_tokens_most
        engine.set_memory(most(whole + 16 * MIB))
        assert engine.stats().kv_tokens_most > grows_to + 2000
        assert slots_of(served) == 32


SERVE = """
import sys, torch
from pathlib import Path
from time import sleep
torch.set_num_threads(1)
from moefit.engine.context import reservation
from moefit.engine.api import EngineSettings, FinishedEvent, SamplingParams
from moefit.engine.engine import Engine
from moefit.host import peak_process_bytes
from moefit.serve.load import load_model
from moefit.serve.config import LoadSettings
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.hf.skeleton import build_skeleton
from queue import SimpleQueue

folder, kv_cache, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
reservation.GIVE_BACK_AFTER = 0.5
how = dict(context=128, step_tokens=144, kv_cache=kv_cache, sequences=16)
first = memory_budget(build_skeleton(folder), LoadSettings(**how))
memory = first.all_resident_bytes - (4 << 20)
served = load_model(folder, LoadSettings(memory=memory, **how))
slots = lambda: sum(served.report()["slots"].values())
before = slots()
engine = Engine(served, EngineSettings())
engine.start()
for _ in range(2):
    events = SimpleQueue()
    prompt = [3 + at * at % 200 for at in range(length)]
    engine.submit(prompt, SamplingParams(max_tokens=4, temperature=0.0), events.put)
    while not isinstance(event := events.get(), FinishedEvent):
        pass
    assert event.reason == "length", event
    during = slots()
    while slots() < before or engine.stats().kv_tokens > 128:
        sleep(0.05)
engine.close()
served.check()
print(memory, peak_process_bytes(), before, during)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["model", "int8"])
def test_peak_stays_below_budget(kv_cache, tmp_path) -> None:
    """Keys and values of the prompt take 24 MiB, in int8 7 MiB, of 96 MiB of experts."""
    model = tiny("Olmoe", hidden_size=512, intermediate_size=256, num_experts=16,
                 num_hidden_layers=4, vocab_size=256, num_attention_heads=8,
                 num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(saved(model, tmp_path)), kv_cache, "1500"],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    memory, peak, before, during = (int(word) for word in done.stdout.split())
    assert peak <= memory
    assert during < before - (16 if kv_cache == "model" else 4)
