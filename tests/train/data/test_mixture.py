"""Sequences drawn from sources in proportion to weights."""

import json
import math
import random
import signal
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.errors import ConfigError, DataError
from moefit.train import loop, trainer
from moefit.train.config import make_config, read_config
from moefit.train.data.batches import WeightedBatches, training_batches
from moefit.train.data.mixture import BLOCK, Mixture
from moefit.train.data.split import is_held_out
from moefit.train.data.tokens import prepare
from moefit.train.loop import train
from moefit.train.run_folder import read_log

weights = st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(any)


@given(weights, st.integers(0, 2**40))
def test_turns_are_in_proportion_and_belong_to_one_source(found: list[float], turn: int) -> None:
    mixture = Mixture(tuple(found), seed=0)
    before, after = mixture.counts(turn), mixture.counts(turn + 1)
    assert sum(before) == turn
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(found) - 1) + [1]
    for count, weight in zip(before, found, strict=True):
        assert abs(count - turn * weight / math.fsum(found)) < 2 + turn * 1e-12
        assert weight or not count


@given(weights, st.integers(0, 2**32))
def test_each_sequence_of_a_source_is_drawn_once(found: list[float], seed: int) -> None:
    mixture = Mixture(tuple(found), seed)
    drawn = [mixture.drawn(index) for index in range(2 * BLOCK)]
    counts = mixture.counts(2 * BLOCK)
    assert sorted(drawn) == [(n, i) for n, count in enumerate(counts) for i in range(count)]
    assert drawn == [Mixture(tuple(found), seed).drawn(index) for index in range(2 * BLOCK)]


def test_order_depends_on_the_seed_and_has_no_pattern() -> None:
    first, second = (
        [Mixture((0.5, 0.5), seed).drawn(index)[0] for index in range(BLOCK)] for seed in (0, 1)
    )
    assert first != second
    repeats = sum(a == b for a, b in pairwise(first))
    assert 0.35 < repeats / BLOCK < 0.65  # by turns it would be 0


@pytest.fixture
def mixed(tree, tmp_path, monkeypatch):
    """Settings of a run that draws a quarter from letters and the rest from digits."""
    monkeypatch.setattr(trainer, "measured_peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(loop, "draw_curve", lambda *_: None)
    for name, alphabet in (("letters", "abcdef"), ("digits", "012345")):
        (tmp_path / name).mkdir()
        chance = random.Random(name)
        words = ["".join(chance.choices(alphabet, k=3)) for _ in range(8)]
        for number in range(12):
            (tmp_path / name / f"{number}.txt").write_text(" ".join(chance.choices(words, k=90)))
    sources = [{"path": str(tmp_path / "letters"), "weight": 1}]
    sources.append({"path": str(tmp_path / "digits"), "weight": 3})
    return {**tree, "data": {**tree["data"], "sources": sources}}


def test_batches_have_the_sources_in_proportion_and_never_mixed_in_a_sequence(mixed):
    config = make_config(mixed)
    data = prepare(config.data, seq_len=config.seq_len)
    batches = training_batches(config, data)
    assert isinstance(batches, WeightedBatches)
    found, seen = Counter(), set()
    for step in range(128):
        for row in batches.batch(step):
            text = data.tokenizer.decode(row.tolist(), skip_special_tokens=True)
            kinds = {"letter" if one.isalpha() else "digit" for one in text if not one.isspace()}
            (kind,) = kinds
            found[kind] += 1
            seen.add(text)
    assert found == {"letter": 128, "digit": 384}
    assert len(seen) > 100
    used = batches.epochs(128)
    assert used[1] == pytest.approx(384 / batches.sources[1].windows_per_epoch)
    assert batches.epoch(128) == max(used)


def test_a_run_says_how_often_sources_are_used_and_resumes_bit_for_bit(mixed, tmp_path, callback):
    whole = train(make_config({**mixed, "out": str(tmp_path / "whole")}), callback)
    lines = [one for one in callback.messages if "weight" in one]
    assert [line.partition(":")[2].split(",")[0] for line in lines] == [" weight 1", " weight 3"]
    (info,) = (r for r in read_log(tmp_path / "whole") if r["kind"] == "run")
    letters, digits = info["sources"]
    assert letters["path"] == str(tmp_path / "letters")
    assert letters["tokens"] + digits["tokens"] == info["train_tokens"]
    assert digits["epochs"] == pytest.approx(24 / (digits["tokens"] // 16 - 1))
    assert lines[1].endswith(f"{digits['tokens']} tokens, {digits['epochs']:.2f} epochs")
    config = make_config({**mixed, "out": str(tmp_path / "parts")})
    callback.after_step = lambda step: step == 5 and signal.raise_signal(signal.SIGTERM)
    assert train(config, callback).stopped_by == "SIGTERM"
    callback.after_step = None
    parts = train(config, callback)
    register()
    first, second = (
        AutoModelForCausalLM.from_pretrained(one.checkpoint).state_dict() for one in (whole, parts)
    )
    assert all(first[name].equal(second[name]) for name in first)
    other = json.loads(json.dumps(mixed))
    other["data"]["sources"][0]["weight"] = 2
    with pytest.raises(ConfigError, match=r"other settings \(data\.sources\)"):
        train(make_config({**other, "out": str(tmp_path / "parts")}), callback)


def test_files_that_two_sources_have_are_of_the_first(mixed, tmp_path):
    again = {"path": str(tmp_path / "letters" / "3.txt"), "weight": 1}
    mixed["data"]["sources"].append(again)
    config = make_config(mixed)
    with pytest.raises(DataError, match=r"3\.txt has weight 1, but 0 tokens to train on"):
        prepare(config.data, seq_len=config.seq_len)
    again["weight"] = 0
    data = prepare(make_config(mixed).data, seq_len=config.seq_len)
    assert data.source_ends[1] == data.source_ends[2] == data.train.tokens


def test_a_source_that_would_be_held_out_as_a_whole_loses_its_tail_instead(mixed, tmp_path):
    names = [f"{n}.txt" for n in range(60)]
    held_out = next(name for name in names if is_held_out(name, 0.2))
    other = next(name for name in names if not is_held_out(name, 0.2))
    for name, text in ((held_out, "abc def\n"), (other, "123 456\n")):
        (tmp_path / name).write_text(text * 200)
    sources = [{"path": str(tmp_path / name), "weight": 1} for name in (held_out, other)]
    mixed["data"]["sources"] = sources
    data = prepare(make_config(mixed).data, seq_len=16)
    first = data.tokenizer.decode(data.train.open()[: data.source_ends[0]].tolist())
    assert first.removesuffix("<|endoftext|>") == "abc def\n" * 160
    assert data.held_out.documents == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a, weight: -1}]", r"data\.sources\.0\.source\.weight: Input should be greater"),
        ("[{path: a, weight: .nan}]", r"weight: Input should be a finite number"),
        ("[{path: a, weight: .inf}]", r"weight: Input should be a finite number"),
        ("[{path: a, weight: 0}, {path: b, weight: 0}]", "all weights of sources are 0"),
        ("[{path: a, weight: 1}, b]", "but b has none; give all a weight, such as {path: b"),
        ("[{path: a}]", r"weight: Field required"),
        ("[{path: a, weigth: 1}]", "did you mean weight"),
        ("[{path: a, weight: many}]", "weight: Input should be a valid number"),
        ("[3]", r"data\.sources\.0\.path: Input should be a valid string"),
    ],
)
def test_bad_weights_are_refused(sources, message):
    with pytest.raises(ConfigError, match=message):
        read_config(None, [f"data.sources={sources}"])


def test_weights_do_not_work_with_a_source_per_machine():
    given = ["data.sources=[{path: a, weight: 1}, {path: b, weight: 2}]", "data.shard_by=source"]
    with pytest.raises(ConfigError, match="each machine has an equal share of a batch"):
        read_config(None, given)
