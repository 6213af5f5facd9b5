"""Pre-gated models are served like others, and nothing that is read early is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quick import slow_but
from serving import check_served, differs_by, give_slots, greedy, logits, saved
from tiny_models import set_biases, tiny_model, tokens
from torch import Tensor

from moefit.evaluate.prediction import measure_prediction
from moefit.moe.routing import Routing
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.prediction.pregated import EarlyReader, PreGates

EXPERTS, LAYERS = 8, 4
INPUTS = {"input_ids": tokens(1, 11)}


def model_of(rule: str = "top_k:2", **changes: Any) -> Any:
    return tiny_model(
        pregated=True, num_experts=EXPERTS, num_hidden_layers=LAYERS, qk_norm=True,
        inference_rule=rule, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(model_of(), tmp_path_factory.mktemp("pregated"))


@pytest.mark.parametrize("slots", slow_but([3], [1, 3, EXPERTS]))
@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "dense", "top_k:2:renormalize"])
def test_served_equals_model(folder, rule: str, slots: int) -> None:
    check_served(folder, model_of(rule), rule, slots, EXPERTS)


class Checked(EarlyReader):
    """Compares each block's choice with what was known one block before."""

    known: dict[int, set[int]]
    compared = 0

    def read(self, block: int, x_TD: Tensor) -> None:
        self.known = {block + 1: set(self.gates.choice(block, x_TD))}
        super().read(block, x_TD)

    def chosen(self, block: int, routing: Routing) -> None:
        if block:
            chosen = set(routing.ids_TK.flatten().tolist()) - {EXPERTS}
            assert chosen == self.known[block], "the choice is known"
            self.compared += 1


@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "top_k:3:renormalize"])
def test_what_is_known_early_is_what_is_chosen(folder, rule: str) -> None:
    check_known(folder, rule)


def test_what_is_known_early_is_what_routers_with_a_bias_choose(tmp_path) -> None:
    model = model_of(training_rule="top_k:2", score_correction_bias=True)
    set_biases(model)
    check_known(saved(model, tmp_path), "top_k:2")


def check_known(folder: Path, rule: str) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 4)
        served.model.set_inference_rule(rule)
        without = served.watched(None)
        with without:
            expected = greedy(served.model, INPUTS)
        blocks = list(served.blocks.values())
        checked = Checked(blocks, served._shared, PreGates(served.model, blocks))
        with served.watched(checked):
            assert torch.equal(greedy(served.model, INPUTS), expected)
        assert checked.failure == "" and checked.compared >= 8 * (LAYERS - 1)
        report = served.report()
        assert report["prefetches"] == report["prefetches_used"] > 0
        assert report["prefetch_wasted_bytes"] == 0


@torch.inference_mode()
def test_prediction_is_perfect_one_layer_ahead(folder) -> None:
    with load_model(folder, LoadSettings(context=64)) as served:
        give_slots(served, 3)
        report = measure_prediction(served, tokens(1, 30)[0])
    assert report.layers.keys() == {1}
    assert report.total(1).as_dict()["recall"] == 1


def test_other_modes_work(folder) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 3)
        for mode in ("virtual", "bounded", "exact"):
            served.set_mode(mode)
            assert greedy(served.model, INPUTS).isfinite().all()
            served.check()


def test_report_says_that_it_is_pregated(folder) -> None:
    with load_model(folder, LoadSettings(prefetch="off")) as served:
        give_slots(served, 2)
        assert served.report()["prefetch"] == {
            "setting": "pregated", "obstacle": "", "pays": None, "horizon": None,
            "predictor": "pregated", "probes": None, "probes_ignored": "",
        }  # fmt: skip
    with load_model(folder, LoadSettings(precision="auto", memory="4GiB")) as served:
        assert "precision auto" in served.prefetching.obstacle


def test_failure_switches_reading_early_off(folder, monkeypatch) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 2)
        reader = served.prefetching.prefetcher
        assert isinstance(reader, EarlyReader)

        def fail(*_: Any) -> None:
            raise ValueError("no such rule")

        monkeypatch.setattr(reader.gates, "choice", fail)
        assert differs_by(logits(served.model, INPUTS), logits(model_of(), INPUTS)) < 1e-5
        assert "no such rule" in served.report()["prefetch"]["obstacle"]
