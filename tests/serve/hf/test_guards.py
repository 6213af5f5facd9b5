"""Rejected operations of a served model: conversions, saving, and NaN logits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from serving import give_slots
from tiny_served import saved, tiny, tokens
from torch import nn
from typer.testing import CliRunner

from moefit.checkpoint.safetensors import Checkpoint
from moefit.cli import app
from moefit.engine.api import FinishedEvent, SamplingParams
from moefit.engine.engine import Engine
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.evaluate.loading import reference_path
from moefit.evaluate.perplexity import Text, score
from moefit.evaluate.stepwise import score_steps
from moefit.moe.routing import Rule
from moefit.plan.reference import window_logprobs
from moefit.serve.config import LoadSettings
from moefit.serve.hf.guards import refuse_no_numbers
from moefit.serve.load import load_model
from moefit.serve.windows import Windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny("Olmoe"), tmp_path)


def spoil(folder: Path, part: str, value: float = float("nan")) -> None:
    """Overwrite tensors in the checkpoint's file, also while it is served."""
    with Checkpoint(folder) as checkpoint:
        spans = [span for name, span in checkpoint.spans.items() if part in name]
    assert spans
    for span in spans:
        data = torch.full(span.shape, value, dtype=span.dtype).flatten().view(torch.uint8)
        with span.path.open("r+b") as file:
            file.seek(span.offset)
            file.write(data.numpy().tobytes())


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to(dtype)": lambda model: model.to(torch.float16),
    "to(device)": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="meta"),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("part", ["", "model", "model.layers.1", "model.layers.1.mlp"])
def test_conversions_raise_and_change_nothing(folder: Path, conversion: str, part: str) -> None:
    with load_model(folder, LoadSettings()) as served:
        before = served.model(tokens(1, 5)).logits
        with pytest.raises(UnsupportedModelError, match=r"cannot be converted .*moefit.load\("):
            CONVERSIONS[conversion](served.model.get_submodule(part))
        assert torch.equal(served.model(tokens(1, 5)).logits, before)


def test_conversions_to_same_dtype_and_device_pass(folder: Path) -> None:
    with load_model(folder, LoadSettings()) as served:
        model: Any = served.model
        assert model.float() is model and model.to("cpu") is model and model.eval() is model
        assert model.to(torch.float32) is model and model.cpu() is model


def test_other_models_of_class_are_unchanged(folder: Path) -> None:
    with load_model(folder, LoadSettings()):
        other = tiny("Olmoe")
        assert other.half().dtype == torch.float16


def test_served_model_is_not_saved(folder: Path, tmp_path: Path) -> None:
    with load_model(folder, LoadSettings()) as served:
        with pytest.raises(UnsupportedModelError, match=r"its experts are not among.*Copy the fol"):
            served.model.save_pretrained(tmp_path / "made")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 3}, {"num_beams": 2}])
def test_nan_logits_end_generation_with_error(folder: Path, value: float, sampling: dict) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 1)
        served.generate(tokens(1, 4), max_new_tokens=2, **sampling)
        spoil(folder, "experts", value)
        for generate in (served.generate, served.model.generate):
            with pytest.raises(CheckpointError, match=r"logits are not finite.*copy or download"):
                generate(tokens(1, 4), max_new_tokens=8, **sampling)


@pytest.mark.parametrize("more", [(), ("--memory", "9GiB"), ("--temperature", "1")])
def test_nan_logits_print_no_tokens(tmp_path: Path, more: tuple) -> None:
    folder = saved(tiny("Olmoe", vocab_size=8192), tmp_path)
    for file in reference_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    spoil(folder, "experts")
    found = CliRunner().invoke(app, ["generate", str(folder), "a = 1", *more])
    assert isinstance(found.exception, CheckpointError), found.output
    assert "logits are not finite" in str(found.exception)


@pytest.mark.parametrize("mode", ["exact", "virtual", "bounded"])
def test_request_with_nan_weights_ends_with_error(folder: Path, mode: Any) -> None:
    with load_model(folder, LoadSettings(mode=mode)) as served:
        give_slots(served, 1)
        engine, ended, told = Engine(served), Event(), []

        def hear(event: object) -> None:
            told.append(event)
            if isinstance(event, FinishedEvent):
                ended.set()

        engine.start()
        spoil(folder, "experts")
        try:
            for _ in range(3):
                ended.clear()
                engine.submit([3, 4, 5], SamplingParams(max_tokens=8, temperature=0), hear)
                assert ended.wait(30)
        finally:
            engine.close()
        assert told[-1].reason == "error" and "not finite" in told[-1].message


def test_nan_scores_raise(folder: Path) -> None:
    text = Text(ids_T=tokens(40), text_bytes=40, context=8)
    windows = Windows(torch.stack([*tokens(20).split(10)]))
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 1)
        spoil(folder, "experts")
        scorers: list[Callable[[], Any]] = [
            lambda: score(served.model, text, [Rule.parse("top_k:3")]),
            lambda: score_steps(served, text, prompt=2),
            lambda: list(window_logprobs(served, windows)),
        ]
        for scorer in scorers:
            with pytest.raises(CheckpointError, match="logits are not finite"):
                scorer()


def test_excluded_tokens_are_not_errors() -> None:
    refuse_no_numbers(torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(CheckpointError):
            refuse_no_numbers(torch.tensor([[0.0, 1.0], [wrong, 2.0]]))
