"""Many requests through one engine: events, order of service, cancellation and errors."""

import time
from dataclasses import replace
from threading import Thread
from time import sleep
from typing import Any

import pytest
import torch
from engines import Heard, ask, engine_of, generated, greedy, paused, prompts, running
from tiny_served import Disk, reading_through, saved, tiny

from moefit.engine.api import EngineSettings, FinishedEvent, PromptEvent, SamplingParams, TokenEvent
from moefit.engine.engine import FAILED_SECONDS, FAILED_STEPS, Engine
from moefit.engine.request_state import TextDecoding
from moefit.errors import (
    BudgetTooSmallError,
    ConfigError,
    QueueFullError,
    RefusedError,
    RequestTooLargeError,
)
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return saved(tiny("Olmoe"), tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def engine(olmoe):
    """An engine shared by tests that leave no state behind."""
    with engine_of(olmoe, prefill_chunk=6, max_concurrency=3, max_waiting=4) as one:
        yield one


PROMPT = prompts([7])[0]


def test_events_are_ordered(engine):
    heard = ask(engine, PROMPT, greedy(3)).wait()
    assert [type(event) for event in heard.events] == [
        PromptEvent,
        TokenEvent,
        TokenEvent,
        TokenEvent,
        FinishedEvent,
    ]
    assert heard.prompt.logprobs is None
    assert (heard.end.prompt_tokens, heard.end.completion_tokens) == (7, 3)


def test_zero_tokens(engine):
    heard = ask(engine, PROMPT, greedy(0)).wait()
    assert [type(event) for event in heard.events] == [PromptEvent, FinishedEvent]
    assert heard.end.reason == "length"


def test_eos_token_ends_output(engine):
    usual = ask(engine, PROMPT, greedy(8)).wait().tokens
    heard = ask(engine, PROMPT, greedy(8, stop_ids=frozenset({usual[4]}))).wait()
    assert heard.end.reason == "stop"
    assert heard.tokens == usual[: usual.index(usual[4]) + 1]
    assert heard.end.completion_tokens == len(heard.tokens)


def test_several_eos_tokens(olmoe):
    with load_model(olmoe, LoadSettings(context=64)) as served:
        usual = generated(served, PROMPT)
        served.model.generation_config.eos_token_id = [usual[3], usual[5]]
        first = min(usual.index(usual[3]), usual.index(usual[5]))
        with running(served) as engine:
            heard = ask(engine, PROMPT, greedy(8)).wait()
            assert (heard.end.reason, heard.tokens) == ("stop", usual[: first + 1])
            ignoring = ask(engine, PROMPT, greedy(8, ignore_eos=True)).wait()
            assert (ignoring.end.reason, ignoring.tokens) == ("length", usual)


def test_logprobs_of_prompt_and_output(engine):
    crowd = [ask(engine, prompt, SamplingParams(max_tokens=9)) for prompt in prompts()[:2]]
    sampling = greedy(4, logprobs=2, prompt_logprobs=3)
    prompt = prompts([17])[0]
    heard = ask(engine, prompt, sampling).wait()
    for one in crowd:
        one.wait()
    ids = torch.tensor([prompt + heard.tokens])
    with torch.no_grad():
        expected_TV = engine.served.model(ids).logits[0].log_softmax(-1)
    told = heard.prompt.logprobs
    assert told is not None
    assert told[0] is None
    assert len(told) == len(prompt)
    answer = [event.logprob for event in heard.events if isinstance(event, TokenEvent)]
    for place, one in enumerate([*told[1:], *answer]):
        assert one is not None
        assert one.token == ids[0, place + 1]
        assert one.logprob == pytest.approx(float(expected_TV[place, one.token]), abs=1e-4)
        number = 3 if place < len(prompt) - 1 else 2
        best = expected_TV[place].topk(number)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_seeded_output_does_not_depend_on_batch(engine):
    sampling = SamplingParams(max_tokens=12, temperature=1.5, seed=11)
    alone = ask(engine, PROMPT, sampling).wait().tokens
    crowd = [ask(engine, prompt, SamplingParams(max_tokens=9)) for prompt in prompts()[:2]]
    again = ask(engine, PROMPT, sampling).wait().tokens
    for one in crowd:
        one.wait()
    assert again == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], greedy(1), "no tokens"),
        ([1, 61], greedy(1), "token 61 does not exist; the model's are 0 to 60"),
        ([-1], greedy(1), "token -1"),
        ([1], SamplingParams(max_tokens=1, top_p=2.0), "top_p"),
    ],
)
def test_invalid_requests_raise(engine, prompt, sampling, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(prompt, sampling, Heard())


def test_too_large_request_raises(engine):
    with pytest.raises(RequestTooLargeError, match=r"7 tokens .*122 are 129.*128; .*=121 or less"):
        engine.submit(PROMPT, greedy(122), Heard())
    assert ask(engine, PROMPT, greedy(121)).wait().end.completion_tokens == 121
    with pytest.raises(RequestTooLargeError, match=r"at most 128; use a shorter prompt$"):
        engine.submit([1] * 200, greedy(1), Heard())


def test_full_queue_raises(engine):
    with paused(engine) as go:
        running = [ask(engine, PROMPT, greedy(40)) for _ in range(3)]  # 47 of 128 tokens each
        waiting = [ask(engine, PROMPT, greedy(2))]
        with pytest.raises(QueueFullError):
            ask(engine, PROMPT, greedy(2))
        go.set()
        for one in [*running, *waiting]:
            assert one.end.reason == "length"
    assert engine.stats().kv_tokens_used == 0


def test_cancellation_in_every_phase(engine):
    usual = ask(engine, PROMPT, greedy(6)).wait().tokens
    names: dict[str, str] = {}

    def cancels(name: str, after: int) -> Heard:
        count = iter(range(1000))
        return Heard(lambda _event: engine.cancel(names[name]) if next(count) == after else None)

    heard = {"decoding": cancels("decoding", 4), "first": cancels("first", 0), "waiting": Heard()}
    with paused(engine) as go:
        for name, one in heard.items():
            names[name] = engine.submit(prompts([9])[0], greedy(90), one)
        stays = ask(engine, PROMPT, greedy(6))
        engine.cancel(names["waiting"])
        go.set()
        assert {one.end.reason for one in heard.values()} == {"cancelled"}
        assert stays.end.reason == "length"
    assert len(heard["decoding"].tokens) == 4
    assert heard["waiting"].events == [heard["waiting"].end]
    assert stays.tokens == usual
    engine.cancel(names["first"])
    engine.cancel("nobody")
    assert engine.stats().running == 0


def test_failing_listener_does_not_affect_others(engine):
    def fail(_event):
        raise RuntimeError("a client's fault")

    other = Heard()
    engine.submit(PROMPT, greedy(4), fail)
    engine.submit(PROMPT, greedy(4), other)
    assert other.end.reason == "length"


def test_statistics(engine):
    before = engine.stats()
    with paused(engine) as go:
        heard = ask(engine, PROMPT, greedy(5))
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        assert engine.stats().kv_tokens_used == 2  # of the request that waits in the step
        go.set()
        heard.wait()
    after = engine.stats()
    assert after.prompt_tokens_total - before.prompt_tokens_total == 7 + 1
    assert after.generation_tokens_total - before.generation_tokens_total == 5 + 1
    assert after.steps - before.steps == 1 + 2 + 4  # 7 tokens of prompt are two steps of up to 6
    assert after.tokens_per_second > 0
    assert (after.kv_tokens, after.runner) == (128, "packed")


def test_budget_and_mode_changes_during_requests(olmoe):
    with engine_of(olmoe, prefill_chunk=6, max_concurrency=3) as engine:
        served = engine.served
        expected = [generated(served, prompt, 20) for prompt in prompts([3, 9, 14])]
        heard = []
        for slots in (1, 8, 3):
            heard += [ask(engine, prompt, greedy(20)) for prompt in prompts([3, 9, 14])]
            total = served.budget.total_for_slots([slots] * 2)
            assert engine.set_memory(total).total == total == served.budget.total
        assert engine.set_mode("bounded", bound=0.0).mode == "bounded"
        assert engine.set_mode("exact").mode == "exact"
        with pytest.raises(BudgetTooSmallError):
            engine.set_memory(1000)
        with pytest.raises(ConfigError, match="unknown setting"):
            engine.set_mode("exact", speed=11)
        for number, one in enumerate(heard):
            assert one.end.reason == "length"
            assert one.tokens == expected[number % 3]


def test_command_from_engine_thread(engine):
    modes = []
    heard = Heard(lambda event: modes.append(engine.set_mode("exact").mode))
    engine.submit(PROMPT, greedy(1), heard)
    heard.wait()
    assert modes == ["exact"] * 3


def test_failed_step_ends_only_its_requests(olmoe):
    with reading_through(Disk()) as disk, engine_of(olmoe, slots=1) as engine:
        usual = ask(engine, PROMPT, greedy(6)).wait().tokens
        with paused(engine) as go:
            bad = [ask(engine, prompt, greedy(6)) for prompt in prompts([5, 8])]
            disk.failures = 1000
            go.set()
            for one in bad:
                assert one.end.reason == "error"
                assert "Input/output error" in one.end.message
        assert engine.stats().running == 0
        disk.failures = 0
        assert ask(engine, PROMPT, greedy(6)).wait().tokens == usual


def test_repeated_failed_steps_are_reported(olmoe, monkeypatch):
    with reading_through(Disk()) as disk, engine_of(olmoe, slots=1) as engine:
        disk.failures = 1000
        for number in range(FAILED_STEPS):
            assert not engine.steps_fail, number
            assert ask(engine, PROMPT, greedy(2)).wait().end.reason == "error"
        assert engine.steps_fail
        with monkeypatch.context() as patch:
            later = time.monotonic() + FAILED_SECONDS
            patch.setattr("moefit.engine.engine.monotonic", lambda: later)
            assert not engine.steps_fail, "another may be tried"
        disk.failures = 0
        assert ask(engine, PROMPT, greedy(2)).wait().end.reason == "length"
        assert not engine.steps_fail


def test_nan_logits_fail_only_their_request(olmoe, monkeypatch):
    with engine_of(olmoe, slots=None) as engine:
        usual = [ask(engine, prompt, greedy(6)).wait().tokens for prompt in prompts([5, 8])]
        step = engine._runner.step

        def breaks(inputs: Any) -> torch.Tensor:
            logits_NV = step(inputs).clone()
            ends = [sum(one.num_logits for one in inputs[: n + 1]) for n in range(len(inputs))]
            for one, end in zip(inputs, ends, strict=True):
                if one.past == 7 and one.num_logits:  # the third token of the shorter one
                    logits_NV[end - 1] = torch.nan
            return logits_NV

        monkeypatch.setattr(engine._runner, "step", breaks)
        with paused(engine) as go:
            bad, good = (ask(engine, prompt, greedy(6)) for prompt in prompts([5, 20]))
            go.set()
            assert (bad.end.reason, bad.tokens) == ("error", usual[0][:3])
            assert "not finite" in bad.end.message
            assert good.end.reason == "length"
        monkeypatch.undo()
        assert ask(engine, prompts([5])[0], greedy(6)).wait().tokens == usual[0]


def test_queue_time_is_measured(olmoe):
    with engine_of(olmoe, max_concurrency=1) as engine, paused(engine) as go:
        one = ask(engine, PROMPT, greedy(3))
        sleep(0.05)
        go.set()
        assert 0.05 <= one.wait().prompt.waited < 30
        assert ask(engine, PROMPT, greedy(3)).wait().prompt.waited < one.prompt.waited


def test_commands_run_between_steps(olmoe):
    with engine_of(olmoe) as engine:
        with paused(engine) as go:
            done: list[int] = []
            thread = Thread(target=lambda: done.append(engine.between_steps(lambda: 7)))
            thread.start()
            sleep(0.05)
            assert done == []
            go.set()
            thread.join(30)
        assert done == [7]
        with pytest.raises(ZeroDivisionError):
            engine.between_steps(lambda: 1 // 0)
        assert ask(engine, PROMPT, greedy(1)).end.reason == "length"


class Illiterate:
    """A tokenizer that fails on one token, as some do above their vocabulary."""

    def __init__(self, unknown: int):
        self.unknown, self.added_tokens_decoder = unknown, {}

    def decode(self, tokens: list[int], **_: bool) -> str:
        if self.unknown in tokens:
            raise IndexError("piece id is out of range")
        return "".join(f"{token} " for token in tokens)


def test_undecodable_token_fails_only_its_request(olmoe):
    with engine_of(olmoe, slots=None) as engine:
        usual = [ask(engine, prompt, greedy(8)).wait().tokens for prompt in prompts([5, 8])]
        (unknown, *_) = set(usual[0]) - set(usual[1])
        tokenizer: Any = Illiterate(unknown)
        decoding = TextDecoding(tokenizer=tokenizer, eos_ids=frozenset())
        engine._limits = replace(engine._limits, decoding=decoding)
        with paused(engine) as go:
            bad, good = (ask(engine, prompt, greedy(8)) for prompt in prompts([5, 8]))
            go.set()
            assert (good.end.reason, good.tokens) == ("length", usual[1])
            assert bad.end.reason == "error"
            assert "piece id" in bad.end.message
        assert ask(engine, prompts([8])[0], greedy(8)).wait().tokens == usual[1]


def test_request_that_fails_to_start_does_not_stop_engine(olmoe):
    with engine_of(olmoe, slots=None) as engine:
        opened, engine._runner.open = engine._runner.open, _no_memory
        for one in [ask(engine, PROMPT, greedy(3)) for _ in range(2)]:
            assert one.end.reason == "error"
        engine._runner.open = opened
        assert ask(engine, PROMPT, greedy(3)).wait().end.reason == "length"


def _no_memory(request: str, tokens: int) -> None:
    del request, tokens
    raise RuntimeError("no memory to move places together")


def test_closing_cancels_requests(olmoe):
    with load_model(olmoe, LoadSettings(context=64)) as served:
        engine = Engine(served, EngineSettings(max_concurrency=1))
        early = ask(engine, PROMPT, greedy(4))  # before it is started
        engine.start()
        engine.start()
        assert early.end.reason == "length"
        heard = [ask(engine, PROMPT, greedy(50)) for _ in range(3)]
        engine.close()
        engine.close()
        assert {one.end.reason for one in heard[1:]} == {"cancelled"}
        for refused in (lambda: ask(engine, PROMPT, greedy(1)), engine.start):
            with pytest.raises(RefusedError):
                refused()
        assert engine.set_mode("exact").mode == "exact"  # nobody steps: at once
        assert generated(served, PROMPT, 4) == early.tokens


def test_draining_finishes_requests(olmoe):
    with engine_of(olmoe, slots=None) as engine:
        with paused(engine) as go:
            heard = ask(engine, PROMPT, greedy(3))
            assert not engine.drain(0.01)
            with pytest.raises(RefusedError):
                ask(engine, PROMPT, greedy(3))
            go.set()
            assert engine.drain(30)
        assert heard.end.reason == "length"


def test_requests_from_many_threads(olmoe):
    with engine_of(olmoe, max_concurrency=4, context=64) as engine:
        expected = {len(p): generated(engine.served, p, 5) for p in prompts([2, 5, 9])}
        heard: dict[int, list[Heard]] = {2: [], 5: [], 9: []}

        def client(length: int) -> None:
            for _ in range(4):
                heard[length].append(ask(engine, prompts([length])[0], greedy(5)).wait())
                engine.stats()
                engine.check()

        threads = [Thread(target=client, args=(length,)) for length in heard]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for length, ones in heard.items():
            assert [one.tokens for one in ones] == [expected[length]] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"max_model_len": 129}, "max_model_len=129, but .* hold 128 tokens"),
    ],
)
def test_invalid_settings_raise(engine, settings, message):
    with pytest.raises(ConfigError, match=message):
        Engine(engine.served, EngineSettings(**settings))


def test_request_limit_below_context(olmoe):
    with engine_of(olmoe, slots=None, max_model_len=20) as engine:
        assert engine.max_model_len == 20
        with pytest.raises(RequestTooLargeError, match="at most 20"):
            ask(engine, PROMPT, greedy(14))
        assert ask(engine, PROMPT, greedy(13)).end.completion_tokens == 13
