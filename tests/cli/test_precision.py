"""`--memory` alone: the chosen precision, and what commands print about it."""

import json
from pathlib import Path

import pytest
import quantised
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_served import saved, tiny
from typer.testing import CliRunner

from moefit.cli import app
from moefit.cli.app import ModeName
from moefit.cli.options import Dtype, KvCache, MemoryOptions, ServingOptions
from moefit.cli.precision import (
    Candidate,
    _candidates,
    choose_precision,
    known_cost,
    resolve_precision,
)
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.train.data.tokenizer import train_bpe


def candidate(precision: str, resident: int, least: int, dense: str = "native") -> Candidate:
    return Candidate(
        precision=precision, dense_precision=dense, resident_bytes=resident, min_bytes=least
    )


LADDER = (
    candidate("native", 100, 20),
    candidate("auto", 40, 25),
    candidate("auto", 30, 15, "int8"),
)


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [
        (1000, LADDER[0]),
        (100, LADDER[0]),
        (99, LADDER[1]),
        (40, LADDER[1]),
        (39, LADDER[2]),  # dense weights are encoded where nothing else holds all experts
        (30, LADDER[2]),
        (29, LADDER[1]),  # experts are fetched
        (24, LADDER[2]),
        (15, LADDER[2]),
        (14, LADDER[2]),  # runs nowhere: the error names what it takes at least
    ],
)
def test_best_fitting_precision(memory: int, chosen: Candidate) -> None:
    assert choose_precision(memory, LADDER) == chosen


def test_native_precision_is_fetched_as_last_resort() -> None:
    ladder = (candidate("native", 100, 20), candidate("auto", 90, 30))
    assert choose_precision(25, ladder) == ladder[0]


CANDIDATES = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(
        lambda sizes: candidate("auto", max(sizes), min(sizes))
    ),
    min_size=1,
    max_size=5,
)


@given(st.integers(0, 120), CANDIDATES)
def test_resident_precisions_are_preferred(memory: int, candidates: list[Candidate]) -> None:
    chosen = choose_precision(memory, iter(candidates))
    if any(one.resident_bytes <= memory for one in candidates):
        assert chosen.resident_bytes <= memory
    if any(one.min_bytes <= memory for one in candidates):
        assert chosen.min_bytes <= memory
    else:
        assert chosen.min_bytes == min(one.min_bytes for one in candidates)


@given(st.integers(0, 120), st.integers(0, 120), CANDIDATES)
def test_more_memory_never_adds_fetching(one: int, other: int, candidates: list[Candidate]) -> None:
    less, more = sorted((one, other))
    if choose_precision(less, candidates).resident_bytes <= less:
        assert choose_precision(more, candidates).resident_bytes <= more


@pytest.mark.parametrize(
    ("bits", "says"), [(8.5, "-0.0% to +0.1%"), (6, "at 5.3 bits"), (2.5, "below 3 bits")]
)
def test_known_costs_are_measured(bits: float, says: str) -> None:
    assert says in known_cost(bits) and "not measured" in known_cost(bits)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose experts are larger than buffers and staging."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["some text to learn from"], 300)
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_experts": 64}
    made = tiny_model(
        vocab_size=300, num_attention_experts=1, eos_token_id=tokenizer.eos_token_id, **shape
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def resolved(model: str, memory: int | str) -> MemoryOptions:
    return resolve_precision(model, MemoryOptions(memory=str(memory), context=32))


def described(model: str, *more: str) -> dict:
    done = CliRunner().invoke(app, ["describe", model, "--context", "32", "--json", *more])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_all_commands_choose_the_same_precision(model: str, capfd) -> None:
    assert resolved(model, "9GiB").precision == "native"
    said = capfd.readouterr().err
    assert "the checkpoint's own: all" in said and "no loss" in said
    tight = between(model)
    assert resolved(model, tight).precision == "auto"
    said = " ".join(capfd.readouterr().err.split())
    assert "precision: auto: all" in said and "not measured on this model" in said
    assert "encoding takes about" in said and "an estimate" in said and "--exact gives" in said
    assert described(model, "--memory", tight)["precision"] == "auto"
    assert described(model, "--memory", tight, "--exact")["precision"] == "native"
    assert described(model, "--memory", tight, "--precision", "int8")["precision"] == "int8"
    virtual = ServingOptions(memory=tight, context=32, mode=ModeName.virtual)
    assert resolve_precision(model, virtual).experts == "native"
    assert resolve_precision(model, MemoryOptions(context=32)).experts == "native"


@pytest.mark.parametrize(
    ("kind", "dtype", "says"),
    [
        ("mxfp4", "bfloat16", "mxfp4, the checkpoint's own: all"),
        ("nvfp4", "bfloat16", "bfloat16, decoded from the checkpoint's nvfp4: all"),
        ("mxfp4", "float32", "float32, decoded from the checkpoint's mxfp4: all"),
    ],
)
def test_decoded_experts_are_not_called_the_checkpoints_own(
    tmp_path: Path, capfd, kind: str, dtype: str, says: str
) -> None:
    store, config = quantised.KINDS.get(kind, (quantised.mxfp4, {"quant_method": "mxfp4"}))
    family = "GptOss" if kind == "mxfp4" else "Qwen3Moe"
    plain = saved(tiny(family, dtype=torch.bfloat16), tmp_path / "plain")
    folder = quantised.quantise(plain, tmp_path / "quantised", store, config)
    options = MemoryOptions(memory="9GiB", context=32, dtype=Dtype(dtype))
    assert resolve_precision(str(folder), options).precision == "native"
    assert f"precision: {says}" in " ".join(capfd.readouterr().err.split())


def between(model: str) -> str:
    """A budget for all experts in the smallest format, but not in the checkpoint's own."""
    whole = described(model, "--memory", "9GiB", "--exact")["everything"]
    return str(
        (described(model, "--memory", "9GiB", "--precision", "auto")["everything"] + whole) // 2
    )


def test_generate_uses_chosen_precision(model: str) -> None:
    asked = ["generate", model, "some", "--max-new-tokens", "2", "--context", "32"]
    own = CliRunner().invoke(app, [*asked, "--mode", "exact"])
    chosen = CliRunner().invoke(app, [*asked, "--memory", between(model)])
    assert chosen.exit_code == 0 and "precision: auto" in chosen.stderr
    exact = CliRunner().invoke(app, [*asked, "--memory", between(model), "--exact"])
    assert exact.exit_code == 0, exact.exception
    assert "precision:" not in exact.stderr and exact.stdout == own.stdout


def test_dense_weights_are_encoded_only_if_native_fits(model: str) -> None:
    skeleton = build_skeleton(Path(model))
    base = LoadSettings(context=32)
    native, auto, *encoded = _candidates(skeleton, base, ("native", "int8", "int4"))
    assert (native.precision, auto.precision) == ("native", "auto")
    assert [one.dense_precision for one in encoded] == ["int8", "int4"]
    assert all(one.min_bytes <= one.resident_bytes for one in (native, auto, *encoded))


def test_too_small_budget_names_minimum(model: str) -> None:
    done = CliRunner().invoke(app, ["describe", model, "--memory", "5MiB"])
    assert isinstance(done.exception, BudgetTooSmallError)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (MemoryOptions(exact=True, precision="int4"), "--precision changes"),
        (ServingOptions(exact=True, dense_precision="int8"), "--dense-precision changes"),
        (ServingOptions(exact=True, kv_cache=KvCache.int8), "--kv-cache changes"),
        (ServingOptions(exact=True, mode=ModeName.virtual), "--mode changes"),
        (ServingOptions(exact=True, prefill=ModeName.virtual), "--prefill changes"),
        (ServingOptions(exact=True, max_loss="3%"), "--max-loss or --min-speed changes"),
    ],
)
def test_exact_with_other_options_raises(options, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_precision("nowhere", options)


def test_old_rest_option_warns_once(model: str, tmp_path: Path) -> None:
    old = CliRunner().invoke(app, ["describe", model, "--rest", "int8", "--json"])
    new = CliRunner().invoke(app, ["describe", model, "--dense-precision", "int8", "--json"])
    assert json.loads(old.stdout)["rest"] == json.loads(new.stdout)["rest"] == "int8"
    assert old.stderr.count("--rest is now called --dense-precision") == 1
    assert "--rest" not in new.stderr
