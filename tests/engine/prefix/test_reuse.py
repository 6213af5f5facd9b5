"""Answers are the same bits with keys and values of earlier requests as without."""

import pytest
import torch
from engines import Heard, ask, greedy, paused, running, text
from levels import compiled
from quick import slow_but
from tiny_families import tiny_family
from tiny_served import saved, tiny

from moefit.api import load as load_by_name
from moefit.engine.api import TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.prefix.cache import PrefixStats
from moefit.engine.prefix.reuse import find_obstacle
from moefit.engine.runner_probe import choose_runner
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

WIDER: dict[str, dict[str, int]] = {  # as in test_invariance
    "Mixtral": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Olmoe": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "DeepseekV3": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "kv_lora_rank": 32,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tiny("Olmoe", **WIDER["Olmoe"]), tmp_path_factory.mktemp("olmoe"))


def answer(engine: Engine, prompt: list[int], tokens: int = 20, **more) -> Heard:
    return ask(engine, prompt, greedy(tokens, logprobs=0, **more)).wait()


def bits(heard: Heard) -> list[float]:
    """Tokens of an answer and their log-probabilities."""
    made = [event for event in heard.events if isinstance(event, TokenEvent)]
    assert made and heard.end.reason == "length"
    return [number for event in made for number in (event.token, event.logprob.logprob)]


def conversation(engine: Engine) -> list[Heard]:
    """Three turns that send the answers so far back, then two texts at once that branch off."""
    said, turns = text(37), []
    for turn in range(3):
        turns.append(answer(engine, said))
        said = [*said, *turns[-1].tokens, *text(11 + turn)]
    with paused(engine) as go:
        both = [ask(engine, [*said[:60], *text(n)], greedy(20, logprobs=0)) for n in (9, 17)]
        go.set()
        turns += [one.wait() for one in both]
    return turns


def check(served: ServedModel, **settings) -> None:
    """Compare a conversation with and without reuse."""
    served.model.generation_config.eos_token_id = None
    with running(served, prefix_cache="off", **settings) as engine:
        without = conversation(engine)
        assert not engine.prefix_coverage.active
    assert {one.end.cached_tokens for one in without} == {0}
    with running(served, **settings) as engine:
        assert engine.prefix_coverage.active, engine.prefix_coverage
        among = conversation(engine)
        stats = engine.stats().prefixes
    cached = [one.end.cached_tokens for one in among]
    assert cached == [0, 48, 80, 48, 48] and stats.hits == sum(cached)
    assert stats.queries == sum(one.end.prompt_tokens for one in among) + 1  # and `paused`'s
    for one, other in zip(among, without, strict=True):
        assert bits(one) == bits(other)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", slow_but(["DeepseekV3"], WIDER))
def test_families_in_their_dtype(family, dtype, tmp_path):
    folder = saved(tiny(family, **WIDER[family]), tmp_path)
    with load_model(folder, LoadSettings(context=256, dtype=dtype)) as served:
        check(served)


@compiled
@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_int8_keys_and_values(family, tmp_path):
    folder = saved(tiny(family, **WIDER[family]), tmp_path)
    settings = LoadSettings(context=256, dtype=torch.bfloat16, kv_cache="int8")
    with load_model(folder, settings) as served:
        check(served, prefill_chunk=7)


@compiled
@pytest.mark.slow
def test_a_dsmoe_whose_experts_are_fetched():
    with load_by_name("reference", context=256, dtype=torch.bfloat16) as served:
        budget = served.budget
        slots = sum(block.slot_bytes for block in budget.blocks) * 2
        served.set_memory(budget.fixed + slots + (8 << 20))
        check(served)
        said = text(37)
        with running(served) as engine:
            first = answer(engine, said)
            engine.set_memory(budget.fixed + slots + (12 << 20))
            assert answer(engine, said).end.cached_tokens == 32, "the budget changes no answer"
            engine.set_mode("virtual")
            assert not engine.prefix_coverage.active
            assert "depends on which experts" in engine.prefix_coverage.describe()
            assert answer(engine, said).end.cached_tokens == 0
            engine.set_mode("exact")
            again = answer(engine, said)
            assert again.end.cached_tokens == 32 and bits(again) == bits(first)


@compiled
def test_states_of_other_modes_are_kept_apart(folder):
    with load_model(folder, LoadSettings(context=256)) as served:
        served.model.generation_config.eos_token_id = None
        with running(served, prefix_cache="on") as engine:
            assert engine.prefix_coverage.active
            engine.set_mode("virtual")
            assert answer(engine, text(37)).end.cached_tokens == 0
            assert answer(engine, text(37)).end.cached_tokens == 32, "switched on"
            assert "may differ" in engine.prefix_coverage.describe()
            engine.set_mode("exact")
            assert answer(engine, text(37)).end.cached_tokens == 0
            engine.set_mode("bounded", bound=0.5)
            assert answer(engine, text(37)).end.cached_tokens == 0


@compiled
def test_requests_that_arrive_together_compute_their_prefix_once(folder):
    with load_model(folder, LoadSettings(context=512)) as served:
        served.model.generation_config.eos_token_id = None
        said = text(60)
        asked = [said, said, [*said, 5], [*said[:32], *text(9)], text(12)]
        with running(served, prefix_cache="off") as engine:
            expected = [bits(answer(engine, one)) for one in asked]
        with running(served, prefill_chunk=7) as engine:
            with paused(engine) as go:
                together = [ask(engine, one, greedy(20, logprobs=0)) for one in asked]
                gone = ask(engine, said, greedy(20))
                engine.cancel("request-7")
                go.set()
                assert [bits(one.wait()) for one in together] == expected
            assert [one.end.cached_tokens for one in together] == [0, 48, 48, 32, 0]
            assert gone.wait().end.reason == "cancelled"


@compiled
def test_waiting_requests_go_on_when_the_first_is_cancelled(folder):
    with load_model(folder, LoadSettings(context=512)) as served:
        served.model.generation_config.eos_token_id = None
        said = text(60)
        with running(served, prefix_cache="off") as engine:
            expected = bits(answer(engine, said))
        with running(served, prefill_chunk=5) as engine:
            step, steps = engine._runner.step, []

            def cancels(inputs):
                steps.append(len(inputs))
                if len(steps) == 6:
                    engine.cancel("request-2")
                return step(inputs)

            engine._runner.step = cancels
            with paused(engine) as go:
                first, *others = [ask(engine, said, greedy(20, logprobs=0)) for _ in range(3)]
                go.set()
                assert [bits(one.wait()) for one in others] == [expected, expected]
            assert first.wait().end.reason == "cancelled"
            assert 0 < others[0].end.cached_tokens < others[1].end.cached_tokens == 48


@compiled
def test_an_error_of_a_waiting_request_ends_that_one_only(folder):
    with load_model(folder, LoadSettings(context=512)) as served:
        served.model.generation_config.eos_token_id = None
        with running(served, prefill_chunk=7) as engine:
            join, calls = engine._runner.join, []

            def fails_once(*arguments):
                calls.append(arguments)
                if len(calls) == 1:
                    raise RuntimeError("no memory")
                return join(*arguments)

            engine._runner.join = fails_once
            with paused(engine) as go:
                three = [ask(engine, [*text(34), n], greedy(4)) for n in (5, 6, 7)]
                go.set()
                ends = [one.wait().end for one in three]
            assert [end.reason for end in ends] == ["length", "error", "length"]
            assert "no memory" in ends[1].message and ends[2].cached_tokens == 32
            engine.check()


@compiled
def test_salts_keep_requests_apart(folder):
    with load_model(folder, LoadSettings(context=256)) as served, running(served) as engine:
        served.model.generation_config.eos_token_id = None
        cached = [
            answer(engine, text(37), cache_salt=salt).end.cached_tokens
            for salt in ("", "", "a", "b", "a")
        ]
        assert cached == [0, 32, 0, 0, 32]


@compiled
def test_log_probabilities_of_prompts_are_computed(folder):
    with load_model(folder, LoadSettings(context=256)) as served, running(served) as engine:
        for _ in range(2):
            heard = answer(engine, text(37), prompt_logprobs=0)
            assert heard.end.cached_tokens == 0 and len(heard.prompt.logprobs) == 37


@compiled
def test_blocks_never_keep_a_request_waiting(folder):
    """The cache is full of other texts, and the whole pool is wanted."""
    with load_model(folder, LoadSettings(context=128)) as served, running(served) as engine:
        served.model.generation_config.eos_token_id = None
        for seed in range(6):
            answer(engine, text(40 + seed), tokens=8)
        long = text(100)
        assert answer(engine, long, tokens=28).end.completion_tokens == 28
        assert answer(engine, long, tokens=28).end.cached_tokens == 96
        assert engine.stats().prefixes.evicted > 0


def test_recurrent_states_are_named(tmp_path):
    folder = saved(tiny_family("qwen3_next"), tmp_path)
    with load_model(folder, LoadSettings(context=256)) as served:
        served.model.generation_config.eos_token_id = None
        with running(served, prefix_cache="on") as engine:
            known = engine.prefix_coverage
            assert not known.active and "each with a cache of its own" in known.describe()
            for _ in range(2):
                assert answer(engine, text(37)).end.cached_tokens == 0
            assert engine.stats().prefixes is None


def test_a_cache_of_more_than_keys_and_values_is_noticed(folder, monkeypatch):
    """A model whose states depend on more than the KV cache holds is not reused."""
    with load_model(folder, LoadSettings(context=256)) as served:
        runner, seen = choose_runner(served, 256), []
        step = runner.step

        def depends_on_steps(inputs):
            seen.append(None)
            return step(inputs) + len(seen)

        monkeypatch.setattr(runner, "step", depends_on_steps)
        reason = find_obstacle(served, runner)
        assert reason is not None and "more than keys and values" in reason
        runner.prefixes.check()
        assert runner.prefixes.stats() == PrefixStats()


def test_a_small_pool_is_named(folder):
    with load_model(folder, LoadSettings(context=60)) as served, running(served) as engine:
        assert "fewer than 70 tokens" in engine.prefix_coverage.describe()


def test_failed_requests_leave_no_states(folder, monkeypatch):
    with load_model(folder, LoadSettings(context=256)) as served, running(served) as engine:
        step, calls = engine._runner.step, []

        def fails(inputs):
            calls.append(None)
            if len(calls) == 3:
                raise OSError("no storage")
            return step(inputs)

        monkeypatch.setattr(engine._runner, "step", fails)
        assert answer(engine, text(37)).end.reason == "error"
        assert engine.stats().prefixes.tokens == 0
