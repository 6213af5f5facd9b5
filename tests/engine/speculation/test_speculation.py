"""Answers with drafts are bit-equal to plain ones, whatever the drafts are."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from engines import Heard, ask, greedy, paused, prompts, running, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from levels import compiled
from quick import slow_but
from tiny_models import tiny_model
from tiny_served import saved, tiny

import moefit
from moefit.engine.api import EngineSettings, SamplingParams, TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.prefix.cache import PrefixCache
from moefit.engine.speculation.drafts import MAX_STEP_DRAFTS, Draft, DraftedRequest
from moefit.engine.structured.grammar import GrammarCompiler
from moefit.engine.structured.sources import regex_part, whole
from moefit.errors import ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from tests.engine.test_invariance import WIDER


class Scripted:
    """A drafter that knows the answers, and drafts right and wrong tokens as it is told."""

    name = "scripted"
    computes = False

    def __init__(self):
        self.answers: dict[tuple[int, ...], Sequence[int]] = {}
        self.script: Sequence[tuple[int, int]] = ()
        self.requests: set[str] = set()
        self.calls = 0

    def open(self, request: str, about: DraftedRequest) -> None:
        assert about.tokens > 0
        self.requests.add(request)

    def behind(self, request: str, tokens: int) -> int:
        return 0

    def close(self, request: str) -> None:
        self.requests.discard(request)

    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        found = {}
        for name, (tokens, most) in wanted.items():
            right, wrong = self.script[self.calls % len(self.script)] if self.script else (0, 0)
            self.calls += 1
            following = self._following(tokens)[:right]
            other = [(token + 1) % 30 for token in self._following(tokens)[right:]]
            draft = [*following, *other[:wrong], *[7] * wrong][: right + wrong][:most]
            if draft:
                found[name] = Draft(tokens=tuple(draft), evidence=9)
        return found

    def _following(self, tokens: Sequence[int]) -> Sequence[int]:
        for prompt, answer in self.answers.items():
            done = len(tokens) - len(prompt)
            if tuple(tokens[: len(prompt)]) == prompt and list(tokens[len(prompt) :]) == list(
                answer[:done]
            ):
                return answer[done:]
        return []


def everything(chances, *, most, **_) -> dict[str, int]:
    """Verify all that is drafted."""
    lengths, left = {}, most
    for name, one in chances.items():
        if length := min(len(one), left):
            lengths[name], left = length, left - length
    return lengths


@contextmanager
def drafting(served: Any, **how: Any) -> Iterator[tuple[Engine, Scripted]]:
    """An engine that verifies all drafts of a script."""
    scripted = Scripted()
    engine = Engine(served, EngineSettings(**how), drafter=scripted)
    engine.speculation.choose = everything
    engine.start()
    try:
        yield engine, scripted
        engine.check()
        assert not scripted.requests, "ended requests are forgotten"
    finally:
        engine.close()


def result(heard: Heard) -> list[Any]:
    """Return all that a client sees: tokens, texts, log-probabilities, and the end."""
    heard.wait()
    events = [event for event in heard.events if isinstance(event, TokenEvent)]
    return [*events, replace(heard.end, cached_tokens=0)]


def load(family: str, dtype: torch.dtype, tmp_path_factory: Any, **settings: Any):
    folder = tmp_path_factory.mktemp(family)
    if family == "DsMoe":
        saved(
            tiny_model(hidden_size=64, num_attention_heads=2, max_position_embeddings=256), folder
        )
    else:
        saved(tiny(family, **WIDER[family]), folder)
    return load_model(folder, LoadSettings(context=256, dtype=dtype, **settings))


FAMILIES = [*WIDER, "DsMoe"]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=slow_but(["DeepseekV3", "DsMoe"], FAMILIES))
def served(request, dtype, tmp_path_factory):
    with load(request.param, dtype, tmp_path_factory) as served:
        served.model.generation_config.eos_token_id = None
        yield served


@compiled
def test_answers_and_log_probabilities_are_the_same_bits(served) -> None:
    """Among others, in chunks; drafts that are right, wrong, partly right and too long."""
    asked = [prompt[:60] for prompt in ([t % 30 for t in text(n)] for n in (40, 3, 17, 30))]
    sampling = [
        greedy(20, logprobs=2),
        SamplingParams(max_tokens=20, temperature=1.3, seed=5, logprobs=0),
        greedy(20, repetition_penalty=1.4, frequency_penalty=0.3, logprobs=0),
        SamplingParams(max_tokens=20, seed=1, top_p=0.8, top_k=9, logprobs=0, prompt_logprobs=0),
    ]
    with running(served, prefill_chunk=7) as engine:
        assert engine.invariance.covered, engine.invariance
        plain = [
            ask(engine, prompt, one).wait() for prompt, one in zip(asked, sampling, strict=True)
        ]
    with drafting(served, prefill_chunk=7) as (engine, scripted):
        for prompt, heard in zip(asked, plain, strict=True):
            scripted.answers[tuple(prompt)] = heard.tokens
        for script in ([(30, 0)], [(0, 3)], [(3, 2), (1, 0), (0, 1), (8, 9)]):
            scripted.script = script
            steps = engine.stats().steps
            with paused(engine) as go:
                heard = [
                    ask(engine, prompt, one) for prompt, one in zip(asked, sampling, strict=True)
                ]
                go.set()
                assert [result(one) for one in heard] == [result(one) for one in plain]
            assert (engine.stats().steps - steps < 20) == (script != [(0, 3)])
        stats = engine.stats().speculation
        assert stats is not None
        assert 0 < stats.accepted < stats.drafted
        assert stats.accepted == sum(stats.accepted_at)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    with load("Olmoe", torch.float32, tmp_path_factory) as served:
        served.model.generation_config.eos_token_id = None
        yield served


requests = st.builds(
    lambda length, most, temperature, seed, stop, logprobs: (
        [token % 30 for token in text(length)],
        SamplingParams(
            max_tokens=most, temperature=temperature, seed=seed, logprobs=logprobs,
            stop_ids=frozenset(stop),
        ),
    ),
    length=st.integers(1, 40),
    most=st.integers(0, 16),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    stop=st.sets(st.integers(0, 60), max_size=6),
    logprobs=st.sampled_from([None, 0]),
)  # fmt: skip
scripts = st.lists(st.tuples(st.integers(0, 18), st.integers(0, 4)), min_size=1, max_size=5)


@compiled
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(requests, min_size=1, max_size=4),
    script=scripts,
    chunk=st.integers(1, 20),
    cancelled=st.integers(0, 12),
)
def test_any_drafts_in_any_batch(olmoe, asked, script, chunk, cancelled) -> None:
    """With kept prefixes, stop tokens within a run of right tokens, and a cancelled request."""
    with running(olmoe, prefill_chunk=chunk) as engine:
        plain = [ask(engine, *one).wait() for one in asked]
    with drafting(olmoe, prefill_chunk=chunk) as (engine, scripted):
        scripted.script = script
        for (prompt, _), heard in zip(asked, plain, strict=True):
            scripted.answers[tuple(prompt)] = heard.tokens
        names: list[str] = []
        seen = iter(range(1000))
        other = Heard(lambda _: engine.cancel(names[0]) if next(seen) == cancelled else None)
        with paused(engine) as go:
            names.append(engine.submit(asked[0][0], greedy(60), other))
            heard = [ask(engine, *one) for one in asked]
            go.set()
            assert [result(one) for one in heard] == [result(one) for one in plain]
        again = [ask(engine, *one) for one in asked]
        assert [result(one) for one in again] == [result(one) for one in plain]
        assert other.wait().end.reason in ("cancelled", "length")
        assert engine.stats().kv_tokens_used == 0
        assert engine.stats().generation_tokens_total == 1 + len(other.tokens) + 2 * sum(
            len(one.tokens) for one in plain
        )


@compiled
@pytest.mark.parametrize("slots", [1, 3, None])
def test_experts_are_fetched_for_all_verified_tokens(slots, tmp_path_factory) -> None:
    with load("Olmoe", torch.float32, tmp_path_factory) as served:
        if slots is not None:
            counts = [slots] * len(served.blocks)
            served.set_memory(served.budget.total_for_slots(counts))
        prompt = text(12)
        with running(served) as engine:
            plain = ask(engine, prompt, greedy(30)).wait()
        with drafting(served) as (engine, scripted):
            scripted.answers[tuple(prompt)], scripted.script = plain.tokens, [(5, 1)]
            assert result(ask(engine, prompt, greedy(30))) == result(plain)


@compiled
def test_accepted_tokens_are_kept_as_prefixes(olmoe) -> None:
    prompt = text(10)
    with drafting(olmoe) as (engine, scripted):
        plain = ask(engine, prompt, greedy(40)).wait()
        engine.between_steps(cast(PrefixCache, engine._runner.prefixes).reset)
        scripted.answers[tuple(prompt)], scripted.script = plain.tokens, [(16, 0)]
        assert ask(engine, prompt, greedy(40)).wait().tokens == plain.tokens
        longer = [*prompt, *plain.tokens, 3]
        follows = ask(engine, longer, greedy(4)).wait()
        assert follows.end.cached_tokens == 48, "49 tokens of the first request were computed"
        engine.between_steps(cast(PrefixCache, engine._runner.prefixes).reset)
        assert ask(engine, longer, greedy(4)).wait().tokens == follows.tokens


@compiled
@pytest.mark.parametrize("cache", slow_but(["int8"], ["model", "int8"]))
def test_prompt_lookup_of_the_shipped_model(cache, tmp_path) -> None:
    """A function is written again, with texts that stop, and fewer steps than tokens."""
    source = "def area(width, height):\n    return width * height\n\n\n"
    with moefit.load("reference", context=1024, dtype=torch.bfloat16, kv_cache=cache) as served:
        ids = served.tokenizer(2 * source)["input_ids"]
        sampling = [
            greedy(40, ignore_eos=True),
            greedy(40, ignore_eos=True, stop=("return width",)),
            SamplingParams(max_tokens=40, seed=3, temperature=0.7, ignore_eos=True, logprobs=1),
        ]
        found = {}
        for speculate in ("off", "ngram"):
            with running(served, speculate=speculate) as engine:
                engine.speculation.choose = everything
                found[speculate] = [ask(engine, ids, one).wait() for one in sampling]
                stats = engine.stats()
        for plain, drafted in zip(found["off"], found["ngram"], strict=True):
            assert result(plain) == result(drafted)
            assert plain.text == drafted.text
        assert stats.speculation is not None
        assert stats.speculation.drafted > 0


@compiled
def test_drafts_within_a_grammar() -> None:
    """Both wrong tokens and right ones that the grammar does not allow are refused."""
    with moefit.load("reference", context=256, dtype=torch.float32) as served:
        compiler = GrammarCompiler(
            served.tokenizer, size=served.model.config.vocab_size, eos_ids={0}
        )
        form = compiler.compile(whole(regex_part("[a-z]{4}=[0-9]{3,12}", "it")))
        prompt = served.tokenizer("def area(")["input_ids"]
        asked = [
            greedy(30, grammar=form),
            SamplingParams(max_tokens=30, seed=4, temperature=1.0, grammar=form, logprobs=0),
        ]
        with running(served) as engine:
            free = ask(engine, prompt, greedy(30, ignore_eos=True)).wait()
            plain = [ask(engine, prompt, one).wait() for one in asked]
        assert all(re.fullmatch("[a-z]{4}=[0-9]{3,12}", one.text) for one in plain)
        for answer, script in (
            (free.tokens, (5, 0)),
            (plain[0].tokens, (7, 0)),
            (plain[0].tokens, (7, 3)),
        ):
            with drafting(served) as (engine, scripted):
                scripted.answers[tuple(prompt)], scripted.script = answer, [script]
                found = [ask(engine, prompt, one).wait() for one in asked]
                drafted = engine.stats().speculation
            assert list(map(result, found)) == list(map(result, plain))
            assert drafted is not None and drafted.drafted > 0


def test_drafts_end_where_the_answer_may_end(olmoe) -> None:
    """Neither KV cache nor logits beyond those of max_tokens are used."""
    with drafting(olmoe, max_concurrency=16) as (engine, scripted):
        prompt = text(5)
        plain = ask(engine, prompt, greedy(10)).wait()
        scripted.answers[tuple(prompt)], scripted.script = plain.tokens, [(16, 16)]
        steps, seen = [], engine._runner.step

        def step(inputs):
            steps.append([(one.past + len(one.tokens), one.num_logits) for one in inputs])
            return seen(inputs)

        engine._runner.step = step
        with paused(engine) as go:
            heard = [ask(engine, prompt, greedy(10)) for _ in range(6)]
            go.set()
            assert all(one.wait().tokens == plain.tokens for one in heard)
    assert max(end for one in steps for end, _ in one) == 14
    drafted = [sum(rows for _, rows in one) - len(one) for one in steps]
    assert 0 < max(drafted) <= MAX_STEP_DRAFTS


def drafted(tokens: Any, evidence: Any) -> Draft:
    return Draft(tokens=tokens, evidence=evidence)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: None, "TypeError"),
        (lambda wanted: dict.fromkeys(wanted, "text"), "AttributeError"),
        (lambda wanted: {one: drafted("text", 3) for one in wanted}, "ValueError"),
        (lambda wanted: {one: drafted((1,), None) for one in wanted}, "TypeError"),
        (lambda wanted: dict.fromkeys(wanted, Draft(tokens=(), evidence=3)), ""),
        (lambda _: {"unknown": Draft(tokens=(1, 2), evidence=3)}, ""),
        (lambda wanted: dict.fromkeys(wanted, Draft(tokens=(7,) * 40, evidence=3)), ""),
        (lambda wanted: dict.fromkeys(wanted, Draft(tokens=(7, 999, 7), evidence=3)), ""),
        (lambda wanted: dict.fromkeys(wanted, Draft(tokens=(-1, 7), evidence=3)), ""),
    ],
)  # fmt: skip
def test_a_failing_drafter_is_switched_off(olmoe, monkeypatch, returned, error) -> None:
    """Drafts that cannot be used end no request; others are cut where they cannot."""
    with drafting(olmoe) as (engine, scripted):
        plain = [ask(engine, text(n), greedy(6)).wait().tokens for n in (5, 9)]
        asked: list[int] = []

        def draft(wanted: Mapping[str, tuple[Sequence[int], int]]) -> Any:
            asked.extend(most for _, most in wanted.values())
            return returned(wanted)

        monkeypatch.setattr(scripted, "draft", draft)
        verified, observe = list[int](), engine.speculation.observe

        def observed(request: str, tokens: Sequence[int], length: int) -> None:
            verified.append(length)
            observe(request, tokens, length)

        monkeypatch.setattr(engine.speculation, "observe", observed)
        heard = [ask(engine, text(n), greedy(6)).wait() for n in (5, 9)]
        assert [one.tokens for one in heard] == plain
        assert {one.end.reason for one in heard} == {"length"}
        assert max(verified) <= max(asked) <= 5
        assert engine.speculation_coverage.active == (not error)
        assert error in engine.speculation_coverage.describe()


def test_drafts_count_in_the_size_of_steps(olmoe, monkeypatch) -> None:
    """What is not covered depends on how large steps become."""
    sizes = []
    monkeypatch.setattr(
        "moefit.engine.runner_probe.uncovered_operations",
        lambda _served, _runner, _places, size: sizes.append(size.tokens) or (),
    )
    for speculate in ("off", "ngram"):
        with running(olmoe, speculate=speculate, prefill_chunk=7, max_concurrency=2):
            pass
    assert sizes == [9, 9 + MAX_STEP_DRAFTS]


def test_when_nothing_is_drafted(olmoe, tmp_path) -> None:
    with running(olmoe) as engine:
        assert engine.speculation_coverage.describe() == "no tokens are drafted: switched off"
        assert engine.stats().speculation is None
    with running(olmoe, speculate="ngram") as engine:
        assert engine.speculation_coverage.describe().startswith("tokens are drafted: by ngram")
        total = olmoe.budget.total_for_slots([3] * len(olmoe.blocks))
        engine.set_memory(total)
        engine.set_mode("virtual")
        assert "in mode virtual" in engine.speculation_coverage.describe()
        assert ask(engine, text(9), greedy(5)).wait().end.reason == "length"
        engine.set_mode("exact")
        engine.set_memory(None)
    folder = saved(tiny("GptOss"), tmp_path)
    with (
        load_model(folder, LoadSettings(context=128)) as served,
        running(served, speculate="ngram", deterministic=True) as engine,
    ):
        assert "one at a time" in engine.speculation_coverage.describe()
        assert ask(engine, prompts()[0], greedy(5)).wait().end.reason == "length"


def test_unknown_settings_raise() -> None:
    with pytest.raises(ConfigError, match="speculate='eagle' is not one of off, ngram, draft, mtp"):
        EngineSettings(speculate="eagle").check()  # pyright: ignore[reportArgumentType]
