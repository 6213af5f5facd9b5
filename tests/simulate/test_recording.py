"""The routing of a text, recorded for the simulator."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_served import saved, tiny, tokens
from typer.testing import CliRunner

from moefit.cli.app import app
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.plan.profile import Profile
from moefit.plan.profiler import Profiler
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.windows import Windows
from moefit.simulate.costs import find_shape
from moefit.simulate.recording import check_recording, record_routing
from moefit.simulate.routing import read_recording


def test_records_what_the_routers_of_transformers_choose(tmp_path: Path) -> None:
    model, ids_BT = tiny("Mixtral"), tokens(3, 9)
    folder, path = saved(model, tmp_path / "model"), tmp_path / "routing.npz"
    with torch.no_grad():
        logits = model(ids_BT[:, :-1], output_router_logits=True).router_logits
    k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    expected_TLK = torch.stack([one.topk(k).indices.sort(1).values for one in logits], 1)
    with load_model(folder, LoadSettings(context=16)) as served:
        found = record_routing(served, Windows(ids_BT), "a test")
    shape = find_shape(str(found.write(path)))
    sequences = read_recording(path, shape)
    assert [len(one) for one in sequences] == [8, 8, 8]
    assert np.array_equal(np.concatenate(sequences), expected_TLK.numpy())
    config = model.config
    assert (shape.name, shape.layers, shape.experts, shape.chosen, shape.bits, shape.matrices) == (
        "routing.shape", config.num_hidden_layers, experts, k, 32, 3
    )  # fmt: skip
    assert (shape.hidden_size, shape.width) == (config.hidden_size, config.intermediate_size)
    names = {one.name for one in tmp_path.iterdir()}
    assert names == {"model", "routing.npz", "routing.shape.yaml"}, "temporary files are left"


def test_what_cannot_be_recorded_is_refused_at_once(tmp_path: Path) -> None:
    skeleton = build_skeleton(saved(tiny("Mixtral"), tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"ending in \.npz"):
        check_recording(tmp_path / "routing.json", skeleton)
    with pytest.raises(ConfigError, match="is a folder"):
        (tmp_path / "folder.npz").mkdir()
        check_recording(tmp_path / "folder.npz", skeleton)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_recording(tmp_path / "none" / "routing.npz", skeleton)
    check_recording(tmp_path / "routing.npz", skeleton)
    first, *others = skeleton.blocks
    more: Any = SimpleNamespace(num_experts=first.num_experts + 1, layout=first.layout)
    other: Any = SimpleNamespace(model=skeleton.model, blocks=[*others, more])
    with pytest.raises(UnsupportedModelError, match="several sizes or numbers"):
        check_recording(tmp_path / "routing.npz", other)
    config = SimpleNamespace(is_encoder_decoder=True)
    other.model = SimpleNamespace(config=config)
    with pytest.raises(UnsupportedModelError, match="two halves"):
        check_recording(tmp_path / "routing.npz", other)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Profile(facts=None, items={})  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(Profiler, "run", lambda *given, **how: measured)
    text, path = tmp_path / "text", tmp_path / "routing.npz"
    text.write_text("def main():\n    return 1\n" * 40)
    command = ["profile", "reference", "--text", str(text), "--tokens", "200", "--context", "32"]
    refused = CliRunner().invoke(app, [*command, "--routing", str(path)])
    assert isinstance(refused.exception, ConfigError), refused.output
    assert "give --rule top_k:K" in str(refused.exception) and not path.exists()
    made = CliRunner().invoke(app, [*command, "--routing", str(path), "--rule", "top_k:3"])
    assert made.exit_code == 0, made.output
    assert f"moefit simulate {path} --shape {tmp_path / 'routing.shape.yaml'}" in made.output
    shape = str(tmp_path / "routing.shape.yaml")
    found = CliRunner().invoke(app, ["simulate", str(path), "--shape", shape, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["shape"]["chosen"] == 3
