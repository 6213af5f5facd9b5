"""Encoder-decoders are scored on pairs of sources and targets, also by `moefit eval`."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from tiny_served import saved
from torch.nn import functional as F
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from typer.testing import CliRunner

import moefit
from moefit.cli import app
from moefit.errors import DataError
from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.passage import read_pairs
from moefit.evaluate.stepwise import score_steps
from moefit.train.data.tokenizer import train_bpe

PAIRS = "cat mat\tthe cat sat on the mat\ndog\tthe dog barked\nold tree hill\tan old tree\n"


@cache
def folder() -> Path:
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 270)
    config = SwitchTransformersConfig(
        vocab_size=len(tokenizer), d_model=32, d_ff=24, num_layers=2, num_decoder_layers=2,
        num_heads=4, d_kv=8, num_experts=5, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2, decoder_start_token_id=0, router_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    made = saved(model, Path(mkdtemp()) / "switch")
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text(PAIRS)
    return path


def loss_of(windows) -> float:
    """The mean loss of the pairs, by transformers."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder()).eval()
    total = 0.0
    for row in range(len(windows)):
        ids_T = windows.ids(row)
        with torch.no_grad():
            logits = model(**windows.inputs(row, model.device)).logits[0]
        total += float(F.cross_entropy(logits, ids_T[1:], reduction="sum"))
    return total / windows.targets


def test_lines_are_pairs(file: Path) -> None:
    with moefit.load(folder()) as served:
        windows = read_pairs(file, served.tokenizer, 0, 64, None)
        assert len(windows) == 3
        assert windows.ids(1).tolist() == [0, *served.tokenizer("the dog barked")["input_ids"]]
        assert windows.source(2).tolist() == served.tokenizer("old tree hill")["input_ids"]
        assert len(read_pairs(file, served.tokenizer, 0, 64, 2)) == 1
        short = read_pairs(file, served.tokenizer, 0, 4, None)
        assert short.context == 4 and short.ids_BT.shape == (3, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [("one\ttwo\nthree four\n", "line 2 of"), ("\ttwo\n", "line 1 of"), ("", "is empty")],
)
def test_lines_that_are_no_pairs_raise(text: str, says: str, file: Path) -> None:
    file.write_text(text)
    with moefit.load(folder()) as served, pytest.raises(DataError, match=says):
        read_pairs(file, served.tokenizer, 0, 64, None)
    with moefit.load(folder()) as served, pytest.raises(DataError, match="--text"):
        read_pairs(None, served.tokenizer, 0, 64, None)


@pytest.mark.parametrize("slots", [1, 5])
def test_exact_mode_has_the_models_loss(slots: int, file: Path) -> None:
    with moefit.load(folder(), context=64) as served:
        windows = read_pairs(file, served.tokenizer, 0, 64, None)
        served.set_memory(served.budget.total_for_slots([slots] * len(served.blocks)))
        found = score_steps(served, windows)
    assert found.tokens == windows.targets
    assert math.log(found.stepwise) == pytest.approx(loss_of(windows), abs=1e-3)
    assert found.full == pytest.approx(found.stepwise, rel=1e-3)
    assert found.agreement == 1 and found.substituted_mass == 0


def test_fixed_residents_are_chosen_on_pairs(file: Path) -> None:
    with moefit.load(folder(), context=64) as served:
        windows = read_pairs(file, served.tokenizer, 0, 64, None)
        served.set_memory(served.budget.total_for_slots([2] * len(served.blocks)))
        chosen = fix_residents(served, "frequency", calibration=windows)
        for name, experts in served.blocks.items():
            counts = experts.use_counts[:5]
            best = sorted(range(5), key=lambda e, counts=counts: (-counts[e], e))[:2]
            assert chosen[name] == sorted(best)
        found = score_steps(served, windows)
        assert found.bytes_per_token == 0 and found.substituted_mass > 0
        assert found.divergence > 0


def test_eval_command(file: Path) -> None:
    common = ["eval", str(folder()), "--context", "64", "--json"]
    done = CliRunner().invoke(app, [*common, "--text", str(file), "--mode", "exact"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["tokens"] > 0 and abs(said["loss"]) < 1e-3
    done = CliRunner().invoke(app, [*common, "--mode", "exact"])
    assert isinstance(done.exception, DataError) and "tab" in str(done.exception)
