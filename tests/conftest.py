"""Shared fixtures: a small corpus and training run, a recording callback, checkpoints to serve,
the shipped model and a separate cache folder."""

import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# On shared cores OpenMP's spinning threads cost ten times the work on tensors this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

# Without a GPU Triton kernels are interpreted; Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from hypothesis import HealthCheck, settings
from tiny_served import model_of, saved, tiny

import moefit
from moefit.train.config import make_config

# On a busy machine examples take long; that is not a failure.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


class RecordingCallback:
    """A `TrainingCallback` that records its calls; `after_step` is called with each step."""

    def __init__(self):
        self.steps, self.messages, self.stages = [], [], set()
        self.info = None
        self.after_step = None

    def on_prepare(self, stage, done, total):
        self.stages.add(stage)

    def on_start(self, *, step, steps, info):
        self.info = info

    def on_step(self, step, values):
        self.steps.append((step, values))
        if self.after_step is not None:
            self.after_step(step)

    def on_message(self, text):
        self.messages.append(text)


@pytest.fixture
def callback():
    return RecordingCallback()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of ten small text files with some structure to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["expert", "router", "token", "slot", "budget", "dense", "sparse", "memory"]
    chance = random.Random(0)
    for number in range(10):
        lines = [" ".join(chance.choices(words, k=8)) for _ in range(60)]
        (folder / f"text{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_tree(corpus):
    """Returns settings of a run of about a second in a folder."""

    def make(folder):
        return {
            "out": str(folder / "run"),
            "model": {
                "hidden_size": 32,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_attention_experts": 2,
                "num_experts": 4,
                "attention_dropout": 0.1,
            },
            "data": {
                "sources": [str(corpus)],
                "held_out_fraction": 0.2,
                "vocab_size": 300,
                "cache_dir": str(corpus.parent / "cache"),
            },
            "loss": {"mlp_mi": 0.02, "attention_mi": 0.01},
            "optimizer": {"warmup_steps": 2},
            "log": {"every": 1, "eval_every": 4, "eval_tokens": 128},
            "checkpoint": {"every": 4, "keep": 2},
            "steps": 8,
            "seq_len": 16,
            "batch_size": 4,
            "precision": "fp32",
        }

    return make


@pytest.fixture
def tree(make_tree, tmp_path):
    """Settings of a run of about a second, for tests to change."""
    return make_tree(tmp_path)


@pytest.fixture
def config(tree):
    return make_config(tree)


@pytest.fixture(scope="session")
def tab():
    """A tab of a headless Chromium; skips if there is none."""
    from browser import browser

    with browser() as one:
        yield one


@pytest.fixture(scope="session")
def address():
    """A simulated server: a dict with its model, and its address."""
    from page_server import pretend

    handle = {}
    with pretend(handle) as url:
        yield handle, url


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """The shipped model with all experts in memory."""
    with moefit.load("reference") as served:
        yield served


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    """A function that returns the folder of a family's `model_of`."""

    @cache
    def folder(family: str) -> Path:
        return saved(model_of(family), tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return saved(tiny("Mixtral"), tmp_path / "model")


@pytest.fixture
def packed_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate folder of packed stores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moefit" / "packed"
