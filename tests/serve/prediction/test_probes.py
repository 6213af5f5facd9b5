"""Probes: fitted on a text, kept for one checkpoint, and used where they fit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_models import tokens as tiny_tokens
from tiny_served import saved, tiny, tokens, with_slots
from torch import Tensor
from typer.testing import CliRunner

from moefit.cache_argument import forward_with_cache
from moefit.checkpoint.safetensors import SINGLE
from moefit.cli import pack as pack_command
from moefit.cli import plan as plan_command
from moefit.cli.app import app
from moefit.errors import BudgetTooSmallError, CheckpointError, ConfigError, UnsupportedModelError
from moefit.evaluate.prediction import measure_prediction
from moefit.evaluate.report import prediction_tables
from moefit.moe.scoring import ScoringRule
from moefit.plan.profile import Profile
from moefit.plan.profiler import Profiler
from moefit.serve import load
from moefit.serve.config import BlockPlacement, LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.load import load_model
from moefit.serve.memory import held
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.packed.kept import entries, unneeded
from moefit.serve.packed.store import open_packed
from moefit.serve.prediction import fit_probes as fitting
from moefit.serve.prediction import prefetch
from moefit.serve.prediction.fit_probes import ProbeResult, fit_probes
from moefit.serve.prediction.next_router import LinearMap
from moefit.serve.prediction.prefetch import Prefetcher
from moefit.serve.prediction.probes import NO_PROBES, UNUSED, ProbeLocation, Probes, find_probes
from moefit.serve.prediction.recording import RecordedRouter, Recording
from moefit.serve.windows import Windows

assert pack_command and plan_command  # registers the commands
SETTINGS = LoadSettings(context=64, memory="4GiB", prefetch="on")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fitting, "_EPOCHS", 4)
    monkeypatch.setattr(fitting, "_BATCH", 128)


@pytest.fixture
def mixtral(folders) -> tuple[Skeleton, Path]:
    """A checkpoint with a file of probes, which are zero."""
    skeleton = build_skeleton(folders("Mixtral"))
    location = ProbeLocation(skeleton)
    metadata = location.metadata(
        text="some.txt", digest=text().digest, tokens=9, recalls={"0.1": (0.9, 0.8)}
    )
    location.write(metadata, {(0, 1): LinearMap(torch.zeros(8, 32), torch.zeros(8))})
    return skeleton, location.path


def text(rows: int = 8) -> CalibrationText:
    windows = Windows(tokens(rows, 41))
    return CalibrationText(text="some.txt", digest=windows.digest, windows=windows)


def fitted(folder: Path, **changes: Any) -> tuple[Skeleton, ProbeResult]:
    skeleton = build_skeleton(folder, changes.pop("dtype", None))
    return skeleton, fit_probes(skeleton, text(), **changes)


def everything_kept(monkeypatch) -> None:
    """Keep probes of random models too, which routers are as good as."""
    measured = fitting._measured
    monkeypatch.setattr(fitting, "_measured", lambda *given: (1.0, measured(*given)[1]))


@torch.inference_mode()
def decoded(served: ServedModel, steps: int = 24) -> list[Tensor]:
    out, cache = [], None
    for ids_11 in tokens(1, steps, seed=5).split(1, dim=1):
        output, cache = forward_with_cache(served.model, cache, input_ids=ids_11)
        out.append(output.logits[0, -1])
    return out


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("Mixtral", torch.float32),
        ("Olmoe", torch.bfloat16),
        ("GptOss", torch.float16),
        ("DeepseekV3", torch.bfloat16),  # shared experts, groups, a bias, a layer without experts
    ],
)
def test_outputs_are_the_same_with_probes(folders, monkeypatch, family: str, dtype) -> None:
    """Bit for bit, and what predicts is said; depths beyond the last layer have none."""
    everything_kept(monkeypatch)
    _, made = fitted(folders(family), dtype=dtype)
    assert list(made.metadata.recalls) == ["0.1"] and made.metadata.tokens == 8 * 40 * 7 // 8
    results = {}
    for setting in ("off", "on"):
        with load_model(folders(family), replace(SETTINGS, dtype=dtype, prefetch=setting)) as one:
            one.set_memory(with_slots(one, 4))
            one.reset()
            results[setting] = decoded(one)
            report = one.report()
            one.check()
            prefetcher = one.prefetching.prefetcher
            assert prefetcher is None or prefetcher.failure == ""
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    found = report["prefetch"]
    assert found["predictor"] == "probes" and found["obstacle"] == found["probes_ignored"] == ""
    assert found["probes"]["text"] == "some.txt" and found["probes"]["number"] == 1
    assert found["probes"]["bytes"] == (8 * 32 + 8) * dtype.itemsize


def test_recorded_inputs_and_logits_are_those_of_the_model(folders, tmp_path: Path) -> None:
    skeleton = build_skeleton(folders("Olmoe"))
    found = fitting.record(skeleton, text(4), tmp_path / "recorded", lambda done, total: None)
    assert isinstance(found, Recording) and list(found.tokens) == [160, 160]
    with load_model(folders("Olmoe"), SETTINGS) as served, torch.inference_mode():
        for block, name in enumerate(served.blocks):
            parent = served.model.get_submodule(name.rpartition(".")[0])
            weight_ED = dict(parent.named_parameters())["gate.weight"]
            logits_TE = found.inputs(block) @ weight_ED.T
            assert torch.allclose(logits_TE, found.logits(block), atol=1e-4)
            best_TE = torch.zeros_like(found.choice(block))
            best_TE.scatter_(1, logits_TE.topk(3).indices, True)
            assert torch.equal(best_TE, found.choice(block))
        start = found.starts(0)["0.1.weight"]
        routers = served.prefetching.routers
        assert routers is not None
        wanted_TE = routers.scores(0, 1, found.inputs(0))
        assert wanted_TE is not None
        assert torch.allclose(found.inputs(0) @ start.T, wanted_TE, atol=1e-4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "given"])
def test_fits_what_a_router_cannot_know(monkeypatch, score) -> None:
    """A map that begins elsewhere, or nowhere, finds the logits of a linear teacher."""
    monkeypatch.setattr(fitting, "_EPOCHS", 20)
    monkeypatch.setattr(fitting, "_RATE", 0.05)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(2048, 16, generator=generator) * torch.linspace(0.1, 3, 16)
    teacher_ED = torch.randn(8, 16, generator=generator)
    logits_TE = x_TD @ teacher_ED.T
    chosen_TE = torch.zeros(2048, 8, dtype=torch.bool).scatter_(1, logits_TE.topk(2).indices, True)
    router = RecordedRouter(
        rule=ScoringRule(score=score, chosen="kept"), bias_E=None, num_experts=8
    )
    wrong = LinearMap(torch.randn(8, 16, generator=generator), None)
    for start in (None, wrong):
        target = fitting._Target((0, 1), router, logits_TE, chosen_TE, start)
        (probe,) = fitting._fitted(x_TD[:1792], [target])
        found, before = fitting._measured(x_TD[1792:], target, probe, 1792)
        assert found is not None and found > 0.6
        assert before is None if start is None else before is not None and before < 0.45


def test_worse_probes_are_not_kept(folders, monkeypatch) -> None:
    """They are nothing to use, and routers predict as without a file."""
    monkeypatch.setattr(fitting, "_measured", lambda *given: (0.5, 0.5))
    _, made = fitted(folders("Mixtral"))
    assert made.metadata.recalls == {}
    with load_model(folders("Mixtral"), SETTINGS) as served:
        found = served.report()["prefetch"]
        assert found["predictor"] == "next router" and found["probes"]["number"] == 0
        assert isinstance(served.prefetching.prefetcher, Prefetcher)


def test_budget_counts_probes(mixtral) -> None:
    skeleton, path = mixtral
    folder = skeleton.checkpoint.folder
    hidden = path.rename(path.with_name("hidden"))
    before = memory_budget(skeleton, SETTINGS)
    hidden.rename(path)
    size = 4 * (8 * 32 + 8)
    found = memory_budget(skeleton, SETTINGS)
    assert (before.probes, found.probes, found.weights) == (0, size, before.weights + size)
    for other in (replace(SETTINGS, prefetch="off"), replace(SETTINGS, precision="auto")):
        assert memory_budget(skeleton, other).probes == 0
    with load_model(folder, SETTINGS) as served:
        assert served.budget.weights == found.weights
        shutil.rmtree(ProbeLocation(skeleton).folder)  # what is held is counted further on
        placement = dict.fromkeys(served.blocks, BlockPlacement(slots=8, formats=("native",)))
        assert served.placement_budget.budget(placement, None).probes == size


def test_probes_that_do_not_fit_are_left_out(mixtral, monkeypatch) -> None:
    """The least budget does not depend on them."""
    skeleton, path = mixtral
    monkeypatch.setattr(held, "held_bytes", lambda _device: 500 << 20)
    monkeypatch.setattr(held, "droppable_bytes", lambda: held.LIBRARY_PAGES)
    packed = open_packed(skeleton, [])
    whole = memory_budget(skeleton, SETTINGS, packed, 0)
    least = whole.min_bytes - whole.slack
    for memory, fits in ((least, False), (least + 4 * (8 * 32 + 8), True)):
        budget, probes = load._budget(skeleton, replace(SETTINGS, memory=memory), packed)
        assert len(budget.slots()) == 2 and budget.probes == probes.nbytes
        assert (probes.file is not None) == fits == (budget.probes > 0)
        assert fits or ("no room" in probes.ignored and str(path) in probes.ignored)
    budget, _ = load._budget(skeleton, replace(SETTINGS, memory=least - 1), packed)
    with pytest.raises(BudgetTooSmallError):
        budget.slots()


def test_the_cost_model_still_decides(mixtral) -> None:
    with load_model(mixtral[0].checkpoint.folder, replace(SETTINGS, prefetch="auto")) as served:
        prefetcher = served.prefetching.prefetcher
        assert isinstance(prefetcher, Prefetcher) and isinstance(prefetcher.predictor, Probes)
        assert prefetcher.trial is not None
        served.set_memory(with_slots(served, 4))
        assert served.report()["prefetch"] | {"probes": None} == {
            "setting": "auto", "obstacle": "", "pays": False, "horizon": 1,
            "predictor": "probes", "probes": None, "probes_ignored": "",
        }  # fmt: skip


def damaged(kind: str, path: Path, skeleton: Skeleton) -> None:
    """Damage a file of probes, or write one of other probes with sound checksums."""
    location, data = ProbeLocation(skeleton), bytearray(path.read_bytes())
    file = location.open()
    assert file is not None
    maps = file.read(4, torch.device("cpu"))
    one = maps[0, 1]
    if kind == "bits":
        data[-5] ^= 1
        path.write_bytes(data)
    elif kind == "header":
        path.write_bytes(data.replace(b"some.txt", b"same.txt"))
    elif kind == "short":
        path.write_bytes(data[:-100])
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "other tensors":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "shape":
        wide = LinearMap(torch.zeros(8, 16), one.bias_E)
        location.write(file.metadata, {(0, 1): wide})
    elif kind == "place":
        metadata = replace(file.metadata, recalls={"0.9": (0.9, 0.8)})
        location.write(metadata, {(0, 9): one})
    elif kind == "numbers":
        location.write(file.metadata, {(0, 1): LinearMap(one.weight_ED * torch.nan, one.bias_E)})
    elif kind == "dtype":
        location.write(
            replace(file.metadata, dtype="float16"),
            {(0, 1): LinearMap(one.weight_ED.half(), torch.zeros(8).half())},
        )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bits", "is damaged: 0.1.weight does not match its checksum"),
        ("header", "does not match its checksum"),
        ("short", "is cut short"),
        ("nothing", "is damaged"),
        ("other tensors", "no probes of this version"),
        ("shape", "other shapes"),
        ("place", "other shapes"),
        ("numbers", "not finite"),
        ("dtype", "fitted in float16"),
    ],
)
def test_damaged_files_are_not_used(mixtral, kind: str, words: str) -> None:
    skeleton, path = mixtral
    damaged(kind, path, skeleton)
    found = find_probes(skeleton, SETTINGS)
    if found.file is not None:  # of a sound header
        assert kind in ("bits", "numbers")
        found, maps = prefetch._read_probes(found, torch.device("cpu"))
        assert maps == {}
    assert words in found.ignored and str(path) in found.ignored and UNUSED in found.ignored
    assert found.nbytes == 0 and found.as_dict() is None
    assert fitting._fitted_before(ProbeLocation(skeleton), text()) is None


def test_a_damaged_file_is_replaced(mixtral, monkeypatch) -> None:
    skeleton, path = mixtral
    folder = skeleton.checkpoint.folder
    damaged("bits", path, skeleton)
    with load_model(folder, SETTINGS) as served:
        found = served.report()["prefetch"]
        assert found["predictor"] == "next router" and found["probes"] is None
        assert "checksum" in found["probes_ignored"]
    everything_kept(monkeypatch)
    assert not fitted(folder)[1].skipped
    with load_model(folder, SETTINGS) as served:
        assert served.report()["prefetch"]["predictor"] == "probes"


def test_probes_of_another_checkpoint_are_not_used(tmp_path: Path, monkeypatch) -> None:
    """Whether experts were trained further, or dense weights alone, or the file was copied."""
    everything_kept(monkeypatch)
    folder = saved(tiny("Mixtral"), tmp_path / "model")
    _, made = fitted(folder)
    tensors = load_file(folder / SINGLE)
    for part, words in (("gate.weight", "other dense weights"), ("experts", "another checkpoint")):
        changed = {name: one + 1e-3 if part in name else one for name, one in tensors.items()}
        save_file(changed, folder / SINGLE, {"format": "pt"})
        with load_model(folder, SETTINGS) as served:
            found = served.report()["prefetch"]
            assert words in found["probes_ignored"] and found["predictor"] == "next router"
    there = ProbeLocation(build_skeleton(folder)).path
    assert there != made.path
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made.path, there)
    with load_model(folder, SETTINGS) as served:
        assert "fitted to another checkpoint" in served.report()["prefetch"]["probes_ignored"]


def test_the_same_text_is_not_fitted_again_and_leaves_nothing_behind(folders, monkeypatch) -> None:
    everything_kept(monkeypatch)
    skeleton, made = fitted(folders("Mixtral"))
    assert not made.skipped and fitted(folders("Mixtral"))[1].skipped

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_probes(skeleton, text(4), fitting=interrupt)
    assert {one.name for one in made.path.parent.iterdir()} == {".lock", made.path.name}
    file = ProbeLocation(skeleton).open()
    assert file is not None and file.metadata == made.metadata  # the old file stays
    (entry,) = entries()
    assert entry.contents == ("probes",) and not unneeded([entry])


def test_a_file_that_cannot_be_written_leaves_the_old_one(mixtral, monkeypatch) -> None:
    skeleton, path = mixtral
    location, before = ProbeLocation(skeleton), path.read_bytes()
    file = location.open()
    assert file is not None

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        location.write(file.metadata, file.read(1, torch.device("cpu")))
    assert path.read_bytes() == before and {*path.parent.iterdir()} == {path}


def test_models_that_are_not_predicted_are_refused(folders, tmp_path: Path) -> None:
    one = saved(tiny("Mixtral", num_hidden_layers=1), tmp_path / "one")
    with pytest.raises(UnsupportedModelError, match=r"one MoE layer.*leave --probes out"):
        fitted(one)


def test_routers_that_cannot_be_applied_early(tmp_path: Path) -> None:
    """Those of two layers are no map of the state, and only probes predict them."""
    folder = saved(tiny_model(router_hidden_size=8, num_hidden_layers=3), tmp_path / "two")
    with load_model(folder, SETTINGS) as served:
        assert "moefit pack --probes" in served.report()["prefetch"]["obstacle"]
    skeleton = build_skeleton(folder)
    windows = Windows(tiny_tokens(8, 41))
    made = fit_probes(skeleton, CalibrationText(text="a", digest="b", windows=windows))
    assert set(made.metadata.recalls) == {"0.1", "0.2", "1.1"}
    assert all(router is None for _, router in made.metadata.recalls.values())
    with load_model(folder, SETTINGS) as served:
        served.set_memory(with_slots(served, 2))
        found = served.report()["prefetch"]
        assert found["predictor"] == "probes" and found["obstacle"] == ""
        assert found["probes"]["next_router_recall"] is None


def test_pre_gated_models_need_none(tmp_path: Path) -> None:
    skeleton = build_skeleton(saved(tiny_model(pregated=True), tmp_path / "pregated"))
    with pytest.raises(UnsupportedModelError, match="the model is pre-gated"):
        fit_probes(skeleton, text())
    assert find_probes(skeleton, SETTINGS) == NO_PROBES


def test_measures_probes_beside_routers(tmp_path: Path, monkeypatch) -> None:
    """Up to four layers ahead."""
    everything_kept(monkeypatch)
    folder = saved(tiny("Mixtral", num_hidden_layers=6), tmp_path / "six")
    _, made = fitted(folder)
    assert len(made.metadata.recalls) == 5 + 4 + 3 + 2
    with load_model(folder, replace(SETTINGS, probe_depth=4)) as served:
        assert served.prefetching.probes.nbytes == served.budget.probes
        served.set_memory(with_slots(served, 4))
        report = measure_prediction(served, tokens(60))
        assert set(report.layers) == set(report.probes) == {1, 2, 3, 4}
        rows = [one for table in prediction_tables(report, "six") for one in table.columns[0].cells]
        assert "probe, 4 layers ahead" in rows and "router, 4 layers ahead" in rows
        values = report.as_dict()
        assert values["probes"]["1"]["all"]["recall"] > 0 and values["probes_text"] == "some.txt"
    with load_model(folder, SETTINGS) as served:
        assert served.prefetching.probes.nbytes == 5 * 4 * (8 * 32 + 8)


def test_command(tmp_path: Path, monkeypatch) -> None:
    """On the shipped model, since it takes a tokenizer."""
    given = tmp_path / "text"
    given.write_text("def main():\n    return 1\n" * 40)
    command = ["pack", "reference", "--probes"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ConfigError) and "--text" in str(refused.exception)
    found = CliRunner().invoke(
        app, [*command, "--text", str(given), "--tokens", "200", "--context", "32", "--json"]
    )
    assert found.exit_code == 0, found.output
    made = json.loads(found.stdout)
    assert set(made) == {"probes"} and made["probes"]["text"] == "text"
    assert not made["probes"]["skipped"]
    measured = Profile(facts=None, items={})  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(Profiler, "run", lambda *given, **how: measured)
    command = ["profile", "reference", "--probes", "--text", str(given)]
    found = CliRunner().invoke(app, [*command, "--tokens", "200", "--context", "32", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["probes"] == made["probes"] | {"skipped": True, "seconds": 0.0}
