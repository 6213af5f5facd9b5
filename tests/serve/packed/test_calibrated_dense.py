"""Dense weights calibrated on a text: better outputs in the same formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import slow_but
from tiny_families import tiny_family
from tiny_served import FAMILIES, logits, saved, tiny, tokens
from torch import Tensor, nn

import moefit
from moefit.errors import CheckpointError, ConfigError
from moefit.quant.encode import encode_into
from moefit.quant.format import GroupedFormat
from moefit.quant.gptq import encode_gptq
from moefit.quant.grouped_int import GroupedMatrix
from moefit.quant.moments import moments_of
from moefit.serve.config import LoadSettings
from moefit.serve.hf import quant_linear
from moefit.serve.hf.quant_linear import EncodedLinear, GroupedEmbedding, quantizable_modules
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.packed import calibrate, dense_inputs
from moefit.serve.packed.build import PackResult, pack
from moefit.serve.packed.calibrate import CalibrationText, record_block_inputs
from moefit.serve.packed.dense_inputs import DenseInputs
from moefit.serve.windows import Windows
from tests.serve.packed.test_pack import run

INT2, INT4 = GroupedFormat(2), GroupedFormat(4)
WIDE = {"hidden_size": 256}

pytestmark = pytest.mark.usefixtures("packed_cache")


def calibration(digest: str = "one", seed: int = 1, windows: int = 24) -> CalibrationText:
    text = f"{digest}.txt"
    return CalibrationText(
        text=text, digest=digest, windows=Windows(tokens(windows, 33, seed=seed))
    )


def packed(folder: Path, *formats: GroupedFormat, **how: Any) -> PackResult:
    return pack(build_skeleton(folder), [], dense_formats=formats or (INT2,), **how)


def recorded(folder: Path, kept: Path, what: CalibrationText) -> DenseInputs:
    found = record_block_inputs(build_skeleton(folder), what, kept, dense=True).dense
    assert found is not None
    return found


@torch.no_grad()
def own_inputs(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
    """Return the inputs of all linear layers of a transformers model, one window after another."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda module, given: found.setdefault(name, []).append(given[0].flatten(0, -2))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    for ids_T in ids_BT:
        model(ids_T[None], use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_inputs_equal_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied, **WIDE)
    folder = saved(model, tmp_path / "model")
    skeleton, what = build_skeleton(folder), calibration(windows=3)
    linear = {
        name
        for name, module in quantizable_modules(skeleton.model, skeleton.blocks).items()
        if isinstance(module, nn.Linear)
    }
    inputs = recorded(folder, tmp_path / "kept", what)
    own = own_inputs(model, what.windows.ids_BT[:, :-1])
    for name in linear:
        file = inputs.file_of([name])
        assert file is not None, name
        scale = float(own[name].abs().max())
        assert torch.allclose(inputs.read(file), own[name], atol=5e-4 * scale), name
    assert "lm_head" in linear and inputs.file_of(["lm_head"]) == "lm_head"
    if family != "DeepseekV3":
        queries, values = (f"model.layers.1.self_attn.{one}_proj" for one in "qv")
        assert inputs.file_of([values]) == queries
    sizes = [path.stat().st_size for path in (tmp_path / "kept").glob("dense-*")]
    assert len(sizes) < len(linear)


@pytest.mark.parametrize("family", ["dbrx", "qwen3_next", "granitemoehybrid", "gemma4"])
def test_layers_of_other_families_are_recorded(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_linear, "_MIN_WEIGHTS", 64)
    folder = saved(tiny_family(family), tmp_path / "model")
    skeleton = build_skeleton(folder)
    inputs = recorded(folder, tmp_path / "kept", calibration(windows=2))
    modules = quantizable_modules(skeleton.model, skeleton.blocks)
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    assert linear and all(inputs.file_of([name]) for name in linear)


@pytest.mark.parametrize("family", slow_but(["GptOss"], ["Mixtral", "GptOss", "DeepseekV3"]))
def test_calibrated_outputs_on_other_text_are_better(tmp_path: Path, family: str) -> None:
    folder = saved(tiny(family, **WIDE), tmp_path / "model")
    ids_BT = tokens(4, 32, seed=77)

    def output_error() -> float:
        with load_model(folder, LoadSettings()) as served:
            own = logits(served.model, ids_BT)
        with load_model(folder, LoadSettings(dense_precision="int4")) as served:
            assert served.report()["dense_from"] == "packed"
            return float((logits(served.model, ids_BT) - own).square().mean())

    packed(folder, INT4)
    before = output_error()
    made = packed(folder, INT4, calibration=calibration())
    assert made.replaced == made.files
    assert output_error() < before, "inputs of random models have little structure"


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_calibrated_by_their_inputs(tmp_path: Path, tied: bool) -> None:
    model = tiny("Mixtral", tie_word_embeddings=tied, **WIDE)
    folder, what = saved(model, tmp_path / "model"), calibration()
    packed(folder, calibration=what)
    inputs = recorded(folder, tmp_path / "kept", what)
    with load_model(folder, LoadSettings(dense_precision="int2")) as served:
        assert served.report()["calibrated_on"] == ["one.txt"]
        for name in ("model.layers.1.self_attn.v_proj", "lm_head"):
            file, weight_RC = inputs.file_of([name]), model.get_submodule(name).weight.detach()
            assert file is not None
            x_TC, wanted = inputs.read(file), GroupedMatrix.empty(*weight_RC.shape, 2)
            encode_gptq(wanted, weight_RC, moments_of(x_TC, torch.ones(len(x_TC))))
            found = served.model.get_submodule(name)
            assert isinstance(found, EncodedLinear)
            assert torch.equal(found.matrix.codes_RB, wanted.codes_RB)
            assert torch.equal(found.matrix.meta_RMG, wanted.meta_RMG)
        embedding, weight_RC = (
            served.model.get_input_embeddings(),
            model.get_input_embeddings().weight,
        )
        plain = GroupedMatrix.empty(*weight_RC.shape, 2)
        encode_into(plain, weight_RC.detach(), INT2.encoder)
        assert isinstance(embedding, GroupedEmbedding)
        expected = wanted if tied else plain  # the last of the loop is the head's
        assert torch.equal(embedding.codes_RB, expected.codes_RB)


def test_files_are_replaced_for_another_text(tmp_path: Path, packed_cache: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    plain = packed(folder, INT2, INT4)
    made = packed(folder, INT2, INT4, calibration=calibration())
    assert (made.files, made.replaced) == (plain.files, plain.files)
    whole = {path: path.read_bytes() for path in packed_cache.rglob("*.safetensors")}
    for again in (packed(folder), packed(folder, calibration=calibration())):
        assert (again.files, again.skipped) == (0, plain.files // 2)
    assert packed(folder, calibration=calibration("two", 2)).replaced == plain.files // 2
    packed(folder, INT2, INT4, calibration=calibration(), force=True)
    assert {path: path.read_bytes() for path in packed_cache.rglob("*.safetensors")} == whole
    assert not list(packed_cache.rglob(".calibration"))


def test_one_recording_serves_experts_and_dense_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    skeleton, what, kept = build_skeleton(folder), calibration(), tmp_path / "kept"
    assert record_block_inputs(skeleton, what, kept).dense is None
    assert record_block_inputs(build_skeleton(folder), what, kept, dense=True).dense is not None
    monkeypatch.setattr(calibrate, "load_model", lambda *_: pytest.fail("read again"))
    assert record_block_inputs(build_skeleton(folder), what, kept).block(0) is not None
    next(kept.glob("dense-*")).write_bytes(b"")
    monkeypatch.undo()
    assert recorded(folder, kept, what).are_complete()


def test_layers_without_the_shared_input_are_left_out(tmp_path: Path) -> None:
    """In the first window two layers are given one tensor, and in the second they are not."""
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    one, other = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    with dense_inputs.DenseRecorder(layers, None, tmp_path) as recorder:
        for given in ((one, one), (one, other)):
            for layer, x in zip(layers.values(), given, strict=True):
                layer(x)
    assert set(recorder.metadata) == {"a"} and recorder.nbytes == 6 * 4 * 4


def test_inputs_that_are_not_finite_raise(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    recorder = dense_inputs.DenseRecorder({"some.layer": layer}, None, tmp_path)
    with recorder, pytest.raises(CheckpointError, match=r"inputs of some\.layer are not finite"):
        layer(torch.full((1, 2, 4), torch.inf))


def test_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    free = iter((1 << 30, 1 << 10))  # enough for experts' inputs, but not for the others'
    monkeypatch.setattr(
        calibrate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(free)})
    )
    with pytest.raises(CheckpointError, match=r"calibration takes .* 1.00 KiB are free"):
        recorded(folder, tmp_path / "kept", calibration())


def test_nearest_rounding_with_text_raises(folder: Path) -> None:
    with pytest.raises(ConfigError, match="give int4 to have it calibrated"):
        packed(folder, GroupedFormat(4, "nearest"), calibration=calibration())


@pytest.mark.slow  # a minute
def test_shipped_model_loses_less(tmp_path: Path) -> None:
    text, held = tmp_path / "text.py", Path(torch.__file__).parent / "nn/modules/rnn.py"
    text.write_text((Path(torch.__file__).parent / "nn/modules/conv.py").read_text())
    windows = 4

    def loss(**settings: Any) -> float:
        with moefit.load("reference", **settings) as served, torch.inference_mode():
            ids = served.tokenizer(held.read_text(), return_tensors="pt").input_ids[0]
            ids_BT = ids[: windows * 256].view(windows, 256)
            outputs = served.model(ids_BT, labels=ids_BT, use_cache=False)
            return float(outputs.loss)

    own, before = loss(), loss(dense_precision="int3")
    asked = ["reference", "--dense-formats", "int3", "--text", str(text), "--tokens", "8192"]
    made = json.loads(run(*asked, "--json").stdout)
    assert made["text"] == "text.py" and made["files"]
    assert loss(dense_precision="int3") - own < 0.6 * (before - own)
