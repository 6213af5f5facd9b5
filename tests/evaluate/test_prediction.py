"""Measuring how well experts are predicted."""

import json
from pathlib import Path

import pytest
import torch
from tiny_served import saved, tiny, tokens, with_slots
from torch import Tensor
from typer.testing import CliRunner

from moefit.cli import models
from moefit.cli.app import app
from moefit.errors import ConfigError, DataError, UnsupportedModelError
from moefit.evaluate.prediction import PredictionMeter, measure_prediction
from moefit.evaluate.report import prediction_tables
from moefit.moe.routing import Routing
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model

assert models  # registers the command


class Known:
    """A predictor that gives the experts 0 and 1 the highest scores."""

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        return torch.arange(8, 0, -1.0)[None] if ahead == 1 else None


def choice(*experts: int) -> Routing:
    return Routing(torch.tensor([experts]), torch.ones(1, len(experts)))


def test_counts_by_hand(folders) -> None:
    with load_model(folders("Mixtral"), LoadSettings(context=64, memory="4GiB")) as served:
        served.set_memory(with_slots(served, 4))
        blocks = list(served.blocks.values())
        blocks[1].load_all([0])
        meter = PredictionMeter(blocks, Known())
        for chosen in ((0, 1), (0, 2), (4, 5)):
            meter.chosen(0, choice(3, 4))
            meter.read(0, torch.zeros(1, 32))
            meter.chosen(1, choice(*chosen))
    score = meter.scores[1][1]
    assert (score.chosen, score.found, score.found_twice) == (6, 3, 4)
    assert (score.missing, score.missing_found) == (4, 1)  # 0 is in memory; 1 was predicted
    assert meter.baselines["oracle"].as_dict()["recall"] == 0.5  # all but the first layer
    assert meter.baselines["previous token"].found == 5  # 3 and 4 twice, and 0


def test_a_state_that_does_not_change_is_predicted(tmp_path: Path) -> None:
    """Where neither attention nor experts add anything, the next router's choice is certain."""
    model = tiny("Mixtral", num_hidden_layers=3)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            parameter.data.zero_()
    folder = saved(model, tmp_path)
    settings = LoadSettings(context=32, memory="4GiB", prefetch="on")
    with load_model(folder, settings) as served:
        served.set_memory(with_slots(served, 3))
        found = measure_prediction(served, tokens(60))
        assert found.tokens == 60 - 2 * 16  # windows of 32 tokens
        assert set(found.layers) == {1, 2} and set(found.layers[1]) == {1, 2}
        assert found.total(1).as_dict()["recall"] == found.total(2).as_dict()["recall"] == 1.0
        assert (
            found.total(1).missing > 0 and found.as_dict()["ahead"]["1"]["all"]["precision"] > 0.9
        )
        assert len(prediction_tables(found, "tiny")) == 2
        assert served.report()["prefetches"] == 0
        with pytest.raises(DataError, match="prediction begins after 16"):
            measure_prediction(served, tokens(9))
        served.set_mode("virtual")
        with pytest.raises(ConfigError, match="mode exact"):
            measure_prediction(served, tokens(60))
    one_layer = saved(tiny("Mixtral", num_hidden_layers=1), tmp_path / "one")
    with (
        load_model(one_layer, settings) as served,
        pytest.raises(UnsupportedModelError, match="one MoE layer"),
    ):
        measure_prediction(served, tokens(60))
    with (
        load_model(folder, LoadSettings(context=32)) as served,
        pytest.raises(ConfigError, match='prefetch="on"'),
    ):
        measure_prediction(served, tokens(60))


def test_command(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("def main():\n    return 1\n" * 30)
    command = ["bench", "reference", "--memory", "4GiB", "--context", "64", "--text", str(text)]
    found = CliRunner().invoke(app, [*command, "--predict", "--new-tokens", "40", "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["tokens"] == 24 and set(report["ahead"]) == {"1", "2", "3", "4"}
    assert report["ahead"]["1"]["all"]["recall"] > 0.5
    for ignored in (("--prefetch", "auto"), ("--prompt-tokens", "32"), ("--seed", "0")):
        refused = CliRunner().invoke(app, [*command, "--predict", *ignored])
        assert isinstance(refused.exception, ConfigError) and ignored[0] in str(refused.exception)
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ConfigError) and "--predict" in str(refused.exception)
