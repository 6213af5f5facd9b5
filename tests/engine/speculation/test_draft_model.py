"""A draft model continues texts as its own forward pass does, and changes no answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import ask, greedy, paused, running, text
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from levels import compiled
from tiny_served import COMMON, saved, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import moefit
from moefit.engine.api import EngineSettings, SamplingParams
from moefit.engine.engine import Engine
from moefit.engine.prefix.tree import Prefix
from moefit.engine.speculation.draft_model import ModelDrafter
from moefit.engine.speculation.drafts import DraftedRequest, Speculate
from moefit.errors import BudgetTooSmallError, ConfigError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.memory.draft import DRAFT_STEP
from moefit.serve.model import ServedModel
from tests.engine.speculation.test_speculation import everything, result
from tests.engine.test_invariance import WIDER

CONTEXT = 640
LONGER = {**WIDER["Olmoe"], "max_position_embeddings": CONTEXT}


def dense(folder: Path, **changes: Any) -> Path:
    """Save a small model without experts."""
    wide = {"intermediate_size": 48, "max_position_embeddings": CONTEXT}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**COMMON, **wide, **changes})
    return saved(transformers.LlamaForCausalLM(config), folder)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return saved(tiny("Olmoe", **LONGER), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=["same", "other experts", "no experts"])
def served(request, target, tmp_path_factory):
    draft = target
    if request.param == "other experts":
        draft = saved(tiny("Mixtral", seed=3), tmp_path_factory.mktemp("draft"))
    if request.param == "no experts":
        draft = dense(tmp_path_factory.mktemp("draft"))
    with load_model(target, LoadSettings(context=CONTEXT, draft=draft)) as served:
        served.model.generation_config.eos_token_id = None
        yield served


@torch.inference_mode()
def continued(model: ServedModel, tokens: Sequence[int], most: int) -> list[int]:
    """Return a greedy continuation, with the model's own forward pass over the whole text."""
    text = list(tokens)
    for _ in range(most):
        logits_1TV = model.model(input_ids=torch.tensor([text]), use_cache=False).logits
        text.append(int(logits_1TV[0, -1].argmax()))
    return text[len(tokens) :]


def drafted(drafter: ModelDrafter, **wanted: tuple[Sequence[int], int]) -> dict[str, list[int]]:
    found = drafter.draft(wanted)
    drafter.check()
    return {name: list(one.tokens) for name, one in found.items()}


lengths = st.integers(1, 6)


@settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(st.tuples(lengths, lengths, st.booleans()), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_drafts_are_the_models_own_continuation(served: ServedModel, steps, seed) -> None:
    """Whether guesses were right or wrong, and whether a request was left out in a step."""
    assert served.draft is not None
    drafter = ModelDrafter(served.draft, CONTEXT)
    texts = {"a": text(5 + seed), "b": text(17)}
    for name, tokens in texts.items():
        drafter.open(name, DraftedRequest(tokens=100, prefix=Prefix(namespace="", tokens=tokens)))
    for number, (most, new, both) in enumerate(steps):
        names = ["a", "b"] if both else ["a"]
        found = drafted(drafter, **{name: (texts[name], most) for name in names})
        for name in names:
            assert found[name] == continued(served.draft, texts[name], most), (name, number)
            texts[name] = [*texts[name], *found[name][: new - 1], (7 * number + new) % 50]
        if not both:
            texts["b"] = [*texts["b"], new]
    drafter.close("a")
    drafter.close("a")
    drafter.open("a", DraftedRequest(tokens=100, prefix=Prefix(namespace="", tokens=texts["a"])))
    again = drafted(drafter, a=(texts["a"], 3))
    assert again["a"] == continued(served.draft, texts["a"], 3), "with keys of the same text"
    drafter.close("a")
    drafter.close("b")
    assert drafter.behind("a", 3) is None


def test_long_texts_are_read_in_several_calls(served: ServedModel) -> None:
    assert served.draft is not None
    drafter = ModelDrafter(served.draft, CONTEXT)
    longest = served.draft.model.config.max_position_embeddings
    long, short = [*text(100)][:100], text(9)
    if longest >= CONTEXT:
        long = (long * 3)[: 2 * DRAFT_STEP + 5]
        for name in ("long", "short"):
            drafter.open(name, DraftedRequest(tokens=280))
        assert drafter.behind("long", len(long)) == len(long)
        assert drafted(drafter, long=(long, 3)) == {}
        found = drafted(drafter, long=(long, 3), short=(short, 2))
        assert found == {}, "the long one takes all that a call reads"
        found = drafted(drafter, long=(long, 3), short=(short, 2))
        assert found["long"] == continued(served.draft, long, 3)
        assert found["short"] == continued(served.draft, short, 2)
    drafter.open("longest", DraftedRequest(tokens=longest + 1))
    assert drafter.behind("longest", 3) is None, "beyond the draft model's positions"
    assert drafted(drafter, longest=(short, 2)) == {}
    drafter.close("longest")


@compiled
def test_answers_are_the_same_bits(served: ServedModel) -> None:
    asked = [text(n) for n in (20, 3, 17)]
    sampling = [
        greedy(18, logprobs=2),
        SamplingParams(max_tokens=9, temperature=1.3, seed=5, logprobs=0),
        greedy(9, repetition_penalty=1.4, logprobs=0),
    ]
    found = {}
    for speculate in ("off", "draft"):
        with running(served, speculate=speculate, prefill_chunk=7) as engine:
            engine.speculation.choose = everything
            for _ in range(2):  # the second time keys and values of the prompts are there
                with paused(engine) as go:
                    heard = [
                        ask(engine, prompt, one)
                        for prompt, one in zip(asked, sampling, strict=True)
                    ]
                    go.set()
                    answers = [result(one) for one in heard]
                assert found.setdefault("off", answers) == answers
            stats = engine.stats().speculation
            assert engine.speculation_coverage.active == (speculate == "draft")
    assert stats is not None
    assert stats.drafted > 0
    draft = served.draft
    assert draft is not None
    if draft.folder == served.folder:
        assert stats.accepted == stats.drafted, "sampled ones too: with the same random numbers"
        assert stats.accepted_at[10] == 2
    draft.check()


def test_measurements_switch_a_draft_model_off_that_takes_too_long(target) -> None:
    """The model drafts for itself: right, but no faster."""
    with load_model(target, LoadSettings(context=CONTEXT, draft=target)) as served:
        with running(served, speculate="draft") as engine:
            ask(engine, text(5), greedy(3)).wait()  # since then times are of this budget
            speculation = engine.speculation
            speculation._times.add(1, 0.01)
            speculation.stepped = lambda tokens, seconds: speculation._times.add(tokens, 0.01)
            speculation._drafting.seconds = lambda longest: 0.01 * longest
            ask(engine, text(9), greedy(60)).wait()
            stats = engine.stats()
        assert stats.speculation is not None
        assert stats.speculation.drafts <= 3, "tried before their time was known"
        assert stats.speculation.plain_steps > 50


def test_probes_take_a_hundredth_of_the_time(target) -> None:
    """Where drafts do not pay, and reading the prompt for them neither."""
    with load_model(target, LoadSettings(context=CONTEXT, draft=target)) as served:
        served.model.generation_config.eos_token_id = None
        with running(served, speculate="draft") as engine:
            ask(engine, text(5), greedy(3)).wait()
            speculation, probes = engine.speculation, []

            def stepped(tokens: int, _: float) -> None:
                speculation._times.add(tokens, 0.01)
                speculation._seconds += 0.01

            def measure(_: float, unread: Sequence[int], read: int) -> None:
                assert speculation._probes and 0 < read <= DRAFT_STEP
                probes.append(max(unread))
                speculation._probed += 0.1

            speculation._seconds, speculation._probed = 10.0, 0.0
            speculation._drafting.seconds = lambda longest: 0.01 * longest
            speculation._reading.seconds = lambda unread: 0.01 * unread
            speculation.stepped, speculation._measure = stepped, measure
            speculation._times.add(1, 0.01)
            ask(engine, (text(100) * 3)[:300], greedy(200)).wait()
            assert probes[0] > 300
            assert probes[1] == probes[0] - DRAFT_STEP + 1, "it goes on where it has begun"
            assert len(probes) == 2, "0.2 s of less than 20"
            speculation._seconds = 100.0
            ask(engine, text(9), greedy(150)).wait()
            assert len(probes) > 3 and max(probes[2:]) < 90
            assert speculation._probed <= 0.01 * speculation._seconds + 0.1
            stats = engine.stats().speculation
        assert stats is not None and stats.drafts >= 2


def test_a_draft_model_needs_memory(target, tmp_path) -> None:
    plain, folder = LoadSettings(context=CONTEXT), dense(tmp_path, num_hidden_layers=3)
    with load_model(target, plain) as served:
        without = served.budget
        assert without.draft == 0
    how = {"context": CONTEXT, "draft": folder}
    with load_model(target, LoadSettings(**how)) as served:
        budget = served.budget
        weights = (folder / "model.safetensors").stat().st_size
        cache = CONTEXT * 3 * 2 * COMMON["num_key_value_heads"] * 8 * 4
        assert budget.draft > 0.95 * weights + cache
        assert budget.weights == without.weights + budget.draft
        least = budget.min_bytes
    with pytest.raises(BudgetTooSmallError, match=r"of which .* draft model.*no draft model"):
        load_model(target, LoadSettings(memory=least - (16 << 20), **how))


def test_other_vocabularies_are_refused(target, tmp_path) -> None:
    with pytest.raises(ConfigError, match="has 64 tokens, the served model 61"):
        load_model(target, LoadSettings(draft=dense(tmp_path, vocab_size=64)))
    with pytest.raises(ConfigError, match="no tokenizer to compare"):
        moefit.load("reference", draft=tmp_path)


def test_a_chooser_that_fails_leaves_out_its_request_only(target) -> None:
    """At the first token or at a later one; the tokens before that are kept."""

    def failing(after: int) -> Any:
        left = iter(range(after))

        def choose(logits_V: torch.Tensor) -> int:
            if next(left, None) is None:
                raise FloatingPointError
            return int(logits_V.argmax())

        return choose

    with load_model(target, LoadSettings(context=CONTEXT)) as served:
        drafter = ModelDrafter(served, CONTEXT)
        for name, after in (("a", 0), ("b", 2), ("c", 9)):
            about = DraftedRequest(tokens=40, foreseen=lambda after=after: failing(after))
            drafter.open(name, about)
        found = drafted(drafter, a=(text(5), 4), b=(text(7), 4), c=(text(9), 4))
        assert found == {
            "b": continued(served, text(7), 2),
            "c": continued(served, text(9), 4),
        }
        again = drafted(drafter, c=([*text(9), *found["c"]], 3))
        assert again["c"] == continued(served, [*text(9), *found["c"]], 3)


def with_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of 55 tokens, fewer than any model here has rows."""
    file = str(folder / "tokenizer.json")
    Tokenizer(WordLevel({f"t{i}": i for i in range(55)}, unk_token="t0")).save(file)
    return folder


ROWS = {
    "more": (200, [greedy(12), SamplingParams(max_tokens=12, temperature=1.5, seed=3)]),
    "fewer": (55, [greedy(12, logit_bias=((58, -50.0), (7, 1.0))), greedy(12)]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_draft_model_with_other_rows_than_the_served_one(case: str, tmp_path) -> None:
    """The tokenizers are equal: what each has beyond them is never shared, and ends no request."""
    rows, sampling = ROWS[case]
    folders = [tmp_path / name for name in ("target", "draft")]
    target = with_tokenizer(saved(tiny("Olmoe", **LONGER), folders[0]))
    draft = with_tokenizer(dense(folders[1], vocab_size=rows))
    found = {}
    with load_model(target, LoadSettings(context=CONTEXT, draft=draft)) as served:
        served.model.generation_config.eos_token_id = None
        for speculate in ("off", "draft"):
            with running(served, speculate=speculate, prefix_cache="off") as engine:
                engine.speculation.choose = everything
                with paused(engine) as go:
                    heard = [ask(engine, text(9), one) for one in sampling]
                    go.set()
                    found[speculate] = [result(one) for one in heard]
                assert {one.end.reason for one in heard} == {"length"}
                if speculate == "draft":
                    assert engine.speculation_coverage.active
                    drafter: Any = engine.speculation._drafter
                    assert drafter._vocabulary == rows
    assert found["draft"] == found["off"]


def test_models_that_cannot_take_back_are_refused(target, tmp_path) -> None:
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1)
    folder = saved(transformers.MambaForCausalLM(config), tmp_path)
    with (
        load_model(target, LoadSettings(context=64, draft=folder)) as served,
        pytest.raises(UnsupportedModelError, match="cannot be a draft model"),
    ):
        Engine(served, EngineSettings(speculate="draft"))


def test_settings_without_a_draft_model(target) -> None:
    with (
        load_model(target, LoadSettings(context=64)) as served,
        pytest.raises(ConfigError, match=r"moefit.load \(draft="),
    ):
        Engine(served, EngineSettings(speculate="draft"))
    for wrong in ("draft", "draft:", "Draft:x", "eagle"):
        with pytest.raises(ConfigError, match="is not one of off, ngram, mtp, draft:MODEL"):
            Speculate.parse(wrong)
