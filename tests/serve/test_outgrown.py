"""Lines about models and requests that are too much for one machine."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moefit.cli import app, serve
from moefit.errors import BudgetTooSmallError, UnreachedTargetError
from moefit.serve.outgrown import (
    PATIENCE,
    SILENCE,
    Backlog,
    Subject,
    gpus_for,
    plugin_gpus,
    size_line,
    subject_of,
    unfit_line,
    vllm_line,
    weight_bytes,
)

GB = 10**9


@pytest.mark.parametrize(
    ("size", "gpus"),
    [(1, (1, 1)), (56, (1, 1)), (57, (2, 1)), (200, (4, 1)), (448, (8, 1)), (449, (8, 2))],
)
def test_weights_fit_on_the_gpus_named(size: int, gpus: tuple[int, int]) -> None:
    assert gpus_for(size * GB) == gpus


def test_line_has_the_parallelism_that_the_size_needs() -> None:
    line = vllm_line(Subject(name="a/b", weight_bytes=900 * GB))
    assert line is not None
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", "a/b"]
    assert words[words.index("--tensor-parallel-size") + 1] == "8"
    assert words[words.index("--pipeline-parallel-size") + 1] == "3"
    assert vllm_line(Subject(name="my model", weight_bytes=1)) == "vllm serve 'my model'"


def test_dsmoe_is_exported_for_the_plugin_and_gguf_is_not_served() -> None:
    line = vllm_line(Subject(name="runs/a", weight_bytes=1, is_dsmoe=True))
    assert line is not None and "moefit-vllm" in line
    gguf = Subject(name="big.gguf", weight_bytes=90 * GB, is_gguf=True)
    assert "big.gguf" not in str(vllm_line(gguf))
    assert "the safetensors of big.gguf" in str(size_line(gguf, 90 * GB, 16 * GB))


@pytest.mark.parametrize(
    ("size", "kv_heads", "width", "gpus"),
    [
        (1, 2, 512, 1),
        (100, 2, 512, 2),
        (100, 3, 96, 3),  # the least divisor of both that is enough
        (100, 8, 3, None),
        (113, 2, 512, None),
        (448, 8, 512, 8),
        (1340, 32, 512, None),  # three machines, and the plugin has one
    ],
)
def test_gpus_of_the_plugin_divide_the_model(
    size: int, kv_heads: int, width: int, gpus: int | None
) -> None:
    subject = Subject(
        name="a", weight_bytes=size * GB, is_dsmoe=True, kv_heads=kv_heads, expert_width=width
    )
    assert plugin_gpus(subject) == gpus
    line = vllm_line(subject)
    if gpus is None:
        assert line is None
        said = str(size_line(subject, size * GB, GB))
        assert "does not serve this: its weights need" in said
        assert f"num_key_value_heads={kv_heads}" in said and "vllm serve" not in said
    else:
        assert line is not None
        assert (f"--tensor-parallel-size {gpus} " in line) == (gpus > 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"inference_rule": "threshold:0.5"}, ""),
        ({"inference_rule": "threshold_top_k:0.5"}, "inference_rule=threshold_top_k:0.5"),
        ({"router_type": "grap"}, "router_type=grap"),
        (
            {
                "score_correction_bias": True,
                "training_rule": "top_k:2",
                "inference_rule": "top_k:2",
            },
            "score_correction_bias=true, routers",
        ),
        ({"pregated": True}, "pregated=true, routers that are given the inputs of the block"),
        ({"pregated": "previous_token"}, "pregated=previous_token, routers"),
    ],
)
def test_what_the_plugin_refuses_is_said(tmp_path: Path, changed: dict, reason: str) -> None:
    settings = {"model_type": "dsmoe", "num_attention_heads": 8, "num_attention_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
    subject = subject_of("runs/a", tmp_path)
    assert (subject.kv_heads, subject.expert_width) == (2, 64)
    assert reason in subject.refused and bool(reason) == bool(subject.refused)
    assert (vllm_line(subject) is None) == bool(reason)


def test_a_model_that_fits_has_no_line() -> None:
    subject = Subject(name="a/b", weight_bytes=20 * GB)
    assert size_line(subject, 16 * GB, 16 * GB) is None
    assert unfit_line(subject, 20 * GB) is None
    for line in (size_line(subject, 21 * GB, 16 * GB), unfit_line(subject, 16 * GB)):
        assert line is not None and "vllm serve a/b" in line and "the page on scaling" in line


def test_weight_bytes_are_those_of_weight_files(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 5), ("b.safetensors", 7), ("config.json", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 12
    assert weight_bytes(tmp_path / "a.safetensors") == 5


def test_backlog_is_said_once_an_hour_after_a_minute_without_progress() -> None:
    backlog = Backlog(Subject(name="a/b", weight_bytes=1))
    assert backlog.observe(0, 3, 5.0) is None
    assert backlog.observe(PATIENCE - 1, 9, 5.0) is None
    line = backlog.observe(PATIENCE, 4, 5.0)
    assert line is not None and "4 have been waiting" in line and "vllm serve a/b" in line
    assert backlog.observe(2 * PATIENCE, 5, 5.0) is None
    later = PATIENCE + SILENCE
    assert backlog.observe(later, 5, 5.0) is not None


def test_a_queue_that_empties_or_shrinks_is_no_backlog() -> None:
    backlog = Backlog(Subject(name="a/b", weight_bytes=1))
    backlog.observe(0, 3, 5.0)
    backlog.observe(PATIENCE / 2, 0, 5.0)
    assert backlog.observe(PATIENCE, 3, 5.0) is None
    assert backlog.observe(2 * PATIENCE, 2, 5.0) is None
    assert backlog.observe(3 * PATIENCE, 2, 5.0) is not None


@pytest.mark.parametrize("error", [BudgetTooSmallError, UnreachedTargetError])
def test_serve_says_the_line_with_the_error(monkeypatch, error: type[Exception]) -> None:
    def load(*_: object) -> None:
        raise error("too little")

    monkeypatch.setattr(serve, "_loaded", load)
    monkeypatch.setattr(serve, "total_bytes", lambda: 1)
    done = CliRunner().invoke(app, ["serve", "reference", "--port", "0"])
    assert isinstance(done.exception, error)
    assert "vllm serve OUT" in done.stderr


def test_serve_says_nothing_of_a_budget_that_is_only_too_small(monkeypatch) -> None:
    def load(*_: object) -> None:
        raise BudgetTooSmallError("too little")

    monkeypatch.setattr(serve, "_loaded", load)
    done = CliRunner().invoke(app, ["serve", "reference", "--port", "0"])
    assert "vllm" not in done.stderr
