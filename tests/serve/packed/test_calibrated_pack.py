"""Calibrated packing: better outputs in the same formats, separate from other packs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_packing
from quick import slow_but
from serving import give_slots
from tiny_served import logits, saved, tiny, tokens
from torch import Tensor

from moefit.errors import CheckpointError, ConfigError, MoefitError
from moefit.quant.format import Format, parse_format
from moefit.quant.gptq import CalibratedExpert
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.load import load_model
from moefit.serve.packed import build
from moefit.serve.packed.build import PackResult, pack
from moefit.serve.packed.calibrate import CalibrationText, record_block_inputs
from moefit.serve.packed.check import check_packed
from moefit.serve.packed.store import PackedLocation, open_packed
from moefit.serve.precision.allocate import AUTO_FORMATS, ladders_of
from moefit.serve.windows import Windows
from tests.serve.packed.test_pack import run

INT2, INT3, INT4 = (parse_format(f"int{bits}") for bits in (2, 3, 4))
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("packed_cache")


def calibration(digest: str = "one", seed: int = 1, windows: int = 24) -> CalibrationText:
    text = f"{digest}.txt"
    return CalibrationText(
        text=text, digest=digest, windows=Windows(tokens(windows, 33, seed=seed))
    )


def packed(folder: Path, *formats: Format, **how: Any) -> PackResult:
    return pack(build_skeleton(folder), formats or (INT2, INT4), **how)


def calibrations(folder: Path, format: Format) -> list[str]:
    skeleton = build_skeleton(folder)
    store = open_packed(skeleton, [format])
    return [store.calibration(block.name, format) for block in skeleton.blocks]


def files_in(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*.safetensors")}


def output_error(folder: Path, format: Format, ids_BT: Tensor) -> float:
    """Return the error of all logits against the model's."""
    with load_model(folder, LoadSettings()) as served:
        own = logits(served.model, ids_BT)
    with load_model(folder, LoadSettings(precision=format.name)) as served:
        give_slots(served, 8)
        assert served.report()["experts_from"] == "packed"
        return float((logits(served.model, ids_BT) - own).square().mean())


@pytest.mark.parametrize("family", slow_but(["GptOss"], ["Mixtral", "GptOss", "DeepseekV3"]))
def test_calibrated_outputs_on_other_text_are_better(tmp_path: Path, family: str) -> None:
    folder = saved(tiny(family), tmp_path / "model")
    ids_BT = tokens(4, 32, seed=77)
    packed(folder, INT2)
    before = output_error(folder, INT2, ids_BT)
    made = packed(folder, INT2, calibration=calibration())
    assert made.replaced == made.files
    assert output_error(folder, INT2, ids_BT) < 0.9 * before
    assert check_packed(build_skeleton(folder)).problems == []


def test_existing_files_are_used_unless_text_differs(folder: Path, packed_cache: Path) -> None:
    plain = packed(folder)
    assert (plain.files, plain.replaced, plain.text) == (4, 0, "")
    made = packed(folder, calibration=calibration())
    assert (made.files, made.skipped, made.replaced, made.text) == (4, 0, 4, "one.txt")
    assert calibrations(folder, INT4) == ["one", "one"]
    whole = files_in(packed_cache)
    for again in (packed(folder), packed(folder, calibration=calibration())):
        assert (again.files, again.skipped) == (0, 4)
    assert files_in(packed_cache) == whole

    other = packed(folder, INT4, INT3, calibration=calibration("two", seed=2))
    assert (other.files, other.replaced) == (4, 2)
    assert calibrations(folder, INT4) == ["two", "two"]
    assert calibrations(folder, INT2) == ["one", "one"]
    forced = packed(folder, force=True)
    assert (forced.files, forced.replaced) == (4, 0)
    assert calibrations(folder, INT4) == ["", ""]


def test_calibrated_packing_is_deterministic(folder: Path, packed_cache: Path) -> None:
    packed(folder, calibration=calibration())
    whole = files_in(packed_cache)
    packed(folder, calibration=calibration(), force=True)
    assert files_in(packed_cache) == whole
    assert not list(packed_cache.rglob(".calibration"))


def expected_slots(skeleton: Skeleton, what: CalibrationText, folder: Path, format: Format) -> Any:
    """Encode each expert from a separate recording."""
    kept = record_block_inputs(skeleton, what, folder)
    blocks = {block.name: block for block in skeleton.blocks}
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks)
    for index, block in enumerate(skeleton.blocks):
        inputs = kept.block(index)
        assert inputs is not None
        for expert in range(block.num_experts):
            slot = allocate_slot(format, block.layout.specs, CPU)
            native, (x_ND, count_N) = store.native(block.name, expert), inputs.rows(expert)
            CalibratedExpert(block.layout, native, x_ND, count_N).encode(slot.tensors)
            decoded = format.decode(slot.tensors, block.layout.specs, x_ND.dtype)
            off_ND = (
                block.layout.output(decoded, x_ND) - block.layout.output(native, x_ND)
            ).square()
            own_ND = block.layout.output(native, x_ND).square()
            yield (
                block.name,
                expert,
                slot,
                float((count_N @ off_ND).sum() / (count_N @ own_ND).sum()),
            )


def test_experts_are_calibrated_by_their_inputs(folder: Path, tmp_path: Path) -> None:
    skeleton, what = build_skeleton(folder), calibration()
    pack(skeleton, [INT3], calibration=what)
    store = open_packed(skeleton, [INT3])
    for name, expert, expected, error in expected_slots(skeleton, what, tmp_path / "kept", INT3):
        slot = allocate_slot(INT3, expected.specs, CPU)
        store.read(name, expert, slot)
        assert torch.equal(slot.buffer_B, expected.buffer_B)
        assert store.relative_errors(name, INT3)[expert] == pytest.approx(error, rel=1e-3)


def test_unused_expert_is_calibrated_by_other_tokens(tmp_path: Path) -> None:
    """Set router weights that never choose expert 3."""
    model = tiny("Mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3].abs_()
            layer.post_attention_layernorm.weight.abs_()
    folder = saved(model, tmp_path / "model")
    what = calibration(windows=1)
    inputs = record_block_inputs(build_skeleton(folder), what, tmp_path / "kept").block(0)
    assert inputs is not None
    inputs.weight_TE[:, 3] = 0  # if any token did choose it
    x_ND, count_N = inputs.rows(3)
    assert len(x_ND) == 32 and bool((count_N > 0).all())
    packed(folder, INT2, calibration=what)
    assert check_packed(build_skeleton(folder)).problems == []
    with load_model(folder, LoadSettings(precision="int2")) as served:
        assert bool(logits(served.model, tokens(1, 8)).isfinite().all())


KILLED = killed_packing(
    """
what = CalibrationText(text="one.txt", digest="one", windows=Windows(tokens(24, 33)))
pack(build(Path(sys.argv[1])), [parse_format("int2")], calibration=what)
""",
    """
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.windows import Windows
from tiny_served import tokens
""",
)


@pytest.mark.slow  # a process of its own
def test_killed_calibration_resumes_without_text(
    folder: Path, packed_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(folder, INT2)  # some others, to be replaced
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(folder), "12"]
    assert subprocess.run(command, timeout=120, env=here).returncode == -signal.SIGKILL
    assert calibrations(folder, INT2) == ["one", ""], "the second block's is as it was"
    monkeypatch.setattr(
        "moefit.serve.packed.calibrate.load_model", lambda *_: pytest.fail("read again")
    )
    again = packed(folder, INT2, calibration=calibration())
    assert (again.files, again.skipped, again.replaced) == (1, 1, 1)
    monkeypatch.undo()
    resumed = files_in(packed_cache)
    packed(folder, INT2, calibration=calibration(), force=True)
    assert files_in(packed_cache) == resumed


def test_auto_uses_comparable_errors(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral", hidden_size=64, intermediate_size=64), tmp_path / "model")
    skeleton = build_skeleton(folder)
    formats = [parse_format(name) for name in AUTO_FORMATS if name != "native"]
    pack(skeleton, formats, calibration=calibration())
    block = skeleton.blocks[0]
    store = open_packed(skeleton, formats)
    for expert, steps in enumerate(ladders_of(block, store)):
        measured = {one.name: store.relative_errors(block.name, one)[expert] for one in formats}
        assert {one.format: one.error for one in steps[:-1]}.items() <= measured.items()
    pack(skeleton, [INT3], force=True)
    assert len(set(ladders_of(block, open_packed(skeleton, formats)))) == 1, "all alike"


def test_serving_reports_calibration_text(folder: Path) -> None:
    packed(folder, INT4, calibration=calibration())
    with load_model(folder, LoadSettings(precision="int4")) as served:
        assert served.report()["calibrated_on"] == ["one.txt"]
    packed(folder, INT4, force=True)
    with load_model(folder, LoadSettings(precision="int4")) as served:
        assert served.report()["calibrated_on"] == []


def test_nearest_rounding_with_text_raises(folder: Path) -> None:
    with pytest.raises(ConfigError, match="give int4 to have it calibrated"):
        packed(folder, parse_format("int4-nearest"), calibration=calibration())


def test_unencodable_weights_raise(folder: Path, monkeypatch: Any) -> None:
    own = ExpertStore.native

    def native(self: ExpertStore, block: str, expert: int) -> Any:
        tensors = own(self, block, expert)
        if expert == 6:
            tensors["down_proj"][3, 5] = 1e6
        return tensors

    monkeypatch.setattr(build.ExpertStore, "native", native)
    with pytest.raises(CheckpointError, match=r"expert 6 of .*: down_proj: .* 1000000"):
        packed(folder, calibration=calibration())
    place = PackedLocation(build_skeleton(folder))
    assert (place.folder / ".calibration").is_dir(), "the next call need not read the text again"


def test_command(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("def story(words):\n    return sorted(words)\n" * 300)
    asked = ["reference", "--formats", "int2", "--text", str(text), "--memory", "8GiB"]
    asked += ["--tokens", "1024"]
    run("reference", "--formats", "int2")
    said = " ".join(run(*asked).stderr.split())
    assert "calibrated on story.txt (8 replacing files encoded without it)" in said
    assert "of the outputs' squares" in said
    made = json.loads(run(*asked, "--json").stdout)
    assert (made["files"], made["skipped"], made["text"]) == (0, 8, "story.txt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--text", "{text}"],
            "gives 0 windows of 256 tokens, too few to calibrate on",
        ),
        (["--text", "{text}.none"], "cannot read .*story.txt.none: No such file"),
        (["--text", "{text}", "--check"], "--text is for encoding; give one of them"),
        (["--memory", "8GiB"], "none is given"),
    ],
)
def test_invalid_arguments_raise(tmp_path: Path, arguments: list[str], words: str) -> None:
    text = tmp_path / "story.txt"
    text.write_text("once upon a time")
    with pytest.raises(MoefitError, match=words):
        run("reference", *(one.format(text=text) for one in arguments))
