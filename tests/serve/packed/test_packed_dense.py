"""Packed dense weights: those that loading would encode, bit for bit, of the same checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family
from tiny_served import FAMILIES, saved, tiny, tokens

from moefit.checkpoint.safetensors import SINGLE
from moefit.errors import CheckpointError, ConfigError
from moefit.quant.format import GroupedFormat
from moefit.serve.config import LoadSettings
from moefit.serve.hf import quant_linear
from moefit.serve.hf.quant_linear import EncodedLinear, GroupedEmbedding
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed.build import PackResult, pack
from moefit.serve.packed.check import check_packed
from moefit.serve.packed.dense import dense_matrices
from moefit.serve.packed.kept import entries
from moefit.serve.packed.store import open_packed
from tests.serve.packed.test_pack import run

INT4, INT8 = GroupedFormat(4), GroupedFormat(8)
WIDE = {"hidden_size": 256}

pytestmark = pytest.mark.usefixtures("packed_cache")


def packed(folder: Path, *formats: GroupedFormat, **how: Any) -> PackResult:
    return pack(build_skeleton(folder), [], dense_formats=formats or (INT4,), **how)


def encoded_tensors(folder: Path, **settings: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Return where dense weights come from, and all codes, scales, minima and biases."""
    settings = {"context": 64, "dense_precision": "int4"} | settings
    with load_model(folder, LoadSettings(**settings)) as served:
        found = {
            f"{name}.{own}": buffer.clone()
            for name, module in served.model.named_modules()
            if isinstance(module, EncodedLinear | GroupedEmbedding)
            for own, buffer in module.named_buffers()
        }
        return served.report()["dense_from"], found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_encoded_and_nothing_is_encoded(
    tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny(family, tie_word_embeddings=tied, **WIDE), tmp_path / "model")
    source, expected = encoded_tensors(folder)
    assert source == "encoded while loading"
    made = packed(folder)
    assert made.files == len(dense_matrices(build_skeleton(folder)))
    assert 0 < made.dense_errors["int4"] < 0.02
    monkeypatch.setattr(quant_linear, "encode_into", lambda *_: pytest.fail("encoded again"))
    source, found = encoded_tensors(folder)
    assert source == "packed"
    assert_same(found, expected)


# Fused and divided matrices, those that a rule makes, tied ones under several names, other heads.
OTHERS = (
    "dbrx",
    "aria",
    "phimoe",
    "qwen3_next",
    "granitemoehybrid",
    "deepseek_v2",
    "gemma4",
)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_linear, "_MIN_WEIGHTS", 64)
    folder = saved(tiny_family(family), tmp_path / "model")
    expected = encoded_tensors(folder)[1]
    made = packed(folder)
    assert made.files == len(dense_matrices(build_skeleton(folder)))
    source, found = encoded_tensors(folder)
    assert source == "packed"
    assert_same(found, expected)


def test_weights_are_not_loaded_and_the_least_budget_falls(tmp_path: Path) -> None:
    for tied in (False, True):
        model = tiny("Mixtral", tie_word_embeddings=tied, vocab_size=4096, **WIDE)
        folder = saved(model, tmp_path / f"{tied}")
        settings = LoadSettings(context=64, dense_precision="int4")

        def estimate(folder: Path = folder, settings: LoadSettings = settings) -> MemoryBudget:
            return memory_budget(build_skeleton(folder), settings)

        before, own = estimate(), memory_budget(build_skeleton(folder), LoadSettings(context=64))
        assert before.encoding - before.weights >= 4096 * 256 * 4
        packed(folder)
        after = estimate()
        assert after.encoding - after.weights == 1 << 20, "only the buffer that files go through"
        assert after.weights == before.weights < own.weights / 3
        path = folder / SINGLE
        tensors = load_file(path)
        (name,) = (name for name in tensors if "embed_tokens" in name)
        tensors[name][5] = torch.nan  # far from the sample: it would be refused when encoded
        save_file(tensors, path, {"format": "pt"})
        encoded_tensors(folder)
        with pytest.raises(CheckpointError, match="is nan"):
            packed(folder, force=True)


@pytest.mark.parametrize("equal", [False, True])
def test_tied_matrices_that_are_stored_twice(tmp_path: Path, *, equal: bool) -> None:
    """The head is its own matrix where its values are others, as transformers loads it."""
    folder = saved(tiny("Mixtral", tie_word_embeddings=True, **WIDE), tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    names = [one.name for one in dense_matrices(build_skeleton(folder))]
    assert ("lm_head" in names) == (not equal)
    expected = encoded_tensors(folder)[1]
    codes = expected["lm_head.codes_RB"], expected["model.embed_tokens.codes_RB"]
    assert torch.equal(*codes) == equal
    assert packed(folder).files == len(names)
    source, found = encoded_tensors(folder)
    assert source == "packed"
    assert_same(found, expected)
    with load_model(folder, LoadSettings(context=64)) as served:
        assert torch.equal(served.model.lm_head.weight, tensors["lm_head.weight"])


def test_biases_are_loaded(tmp_path: Path) -> None:
    folder = saved(tiny("GptOss", **WIDE), tmp_path / "model")
    packed(folder)
    own = load_file(folder / SINGLE)
    found = encoded_tensors(folder)[1]
    biases = [name for name in found if name.endswith("_proj.bias")]
    assert biases and all(torch.equal(found[name], own[name]) for name in biases)


def test_existing_files_are_skipped_and_missing_ones_encoded(
    tmp_path: Path, packed_cache: Path
) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    expected = encoded_tensors(folder)[1]
    made = packed(folder, INT4, INT8)
    paths = sorted(packed_cache.rglob("dense-int4/*.safetensors"))
    assert made.files == 2 * len(paths) and made.skipped == 0
    assert made.bytes_written == sum(one.stat().st_size for one in packed_cache.rglob("*.safe*"))
    whole = {path: path.read_bytes() for path in paths}
    again = packed(folder)
    assert (again.files, again.skipped) == (0, len(paths))

    paths[0].unlink()
    paths[1].write_bytes(b"")
    source, found = encoded_tensors(folder)
    assert source == f"packed, but encoded while loading in 2 of {len(paths)}"
    assert_same(found, expected)
    again = packed(folder)
    assert (again.files, again.skipped) == (2, len(paths) - 2)
    assert {path: path.read_bytes() for path in paths} == whole
    assert packed(folder, force=True).files == len(paths)
    assert {path: path.read_bytes() for path in paths} == whole


def test_damaged_matrix_raises(tmp_path: Path, packed_cache: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    packed(folder)
    (path,) = packed_cache.rglob("model.layers.1.self_attn.q_proj.safetensors")
    whole = path.read_bytes()
    for place in (-1, 8192):  # in the padding, and in the codes
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        words = r"layers.1.self_attn.q_proj does not match.*--dense-formats int4 --force"
        with pytest.raises(CheckpointError, match=words):
            encoded_tensors(folder)
        assert "does not match its checksum" in check_packed(build_skeleton(folder)).problems[0]
    os.truncate(path, len(whole) - 1)
    assert "in 1 of" in encoded_tensors(folder)[0]


def test_files_of_other_weights_are_ignored(tmp_path: Path, packed_cache: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    packed(folder)
    (path,) = packed_cache.rglob("model.layers.0.self_attn.q_proj.safetensors")
    other = path.with_name("model.layers.0.self_attn.o_proj.safetensors")
    other.write_bytes(path.read_bytes())
    store = open_packed(build_skeleton(folder), [], [INT4])
    assert "holds model.layers.0.self_attn.q_proj" in store.ignored[0]

    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] += 1  # further training
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    store = open_packed(build_skeleton(folder), [], [INT4])
    assert not store.dense.of(INT4).names
    assert "other dense weights" in store.ignored[0] and "more files" in store.ignored[0]
    assert encoded_tensors(folder)[0] == "encoded while loading"
    assert packed(folder).skipped == 0
    assert encoded_tensors(folder)[0] == "packed"


def test_files_of_an_earlier_checkpoint_are_named(tmp_path: Path, packed_cache: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    packed(folder)
    saved(tiny("Mixtral", num_hidden_layers=1, **WIDE), folder)
    (ignored,) = open_packed(build_skeleton(folder), [], [INT4]).ignored
    (kept,) = packed_cache.glob("*-*")
    assert ignored.startswith(f"{kept} was packed from another checkpoint")


def test_an_adapter_changes_the_weights(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    rows = load_file(folder / SINGLE)["model.layers.0.self_attn.q_proj.weight"].shape[0]
    save_file(
        {name.format("A"): torch.ones(2, 256), name.format("B"): torch.ones(rows, 2)},
        adapter / "adapter_model.safetensors",
    )
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    expected = encoded_tensors(folder, adapter=adapter)
    packed(folder)
    found = encoded_tensors(folder, adapter=adapter)
    assert found[0] == "encoded while loading"
    assert_same(found[1], expected[1])
    pack(build_skeleton(folder, adapter=adapter), [], dense_formats=[INT4])
    found = encoded_tensors(folder, adapter=adapter)
    assert found[0] == "packed"
    assert_same(found[1], expected[1])


def test_bfloat16_and_nearest_are_kept_apart(tmp_path: Path) -> None:
    folder = saved(tiny("Olmoe", **WIDE), tmp_path / "model")
    packed(folder)
    how = {"dtype": torch.bfloat16}
    assert encoded_tensors(folder, **how)[0] == "encoded while loading"
    nearest = encoded_tensors(folder, dense_precision="int4-nearest")
    assert nearest[0] == "encoded while loading"
    packed(folder, GroupedFormat(4, "nearest"))
    again = encoded_tensors(folder, dense_precision="int4-nearest")
    assert again[0] == "packed"
    assert_same(again[1], nearest[1])


def test_native_raises(folder: Path) -> None:
    with pytest.raises(ConfigError, match="native dense weights are read from the checkpoint"):
        run(str(folder), "--dense-formats", "native")


def test_checkpoint_that_changes_meanwhile_raises(tmp_path: Path, packed_cache: Path) -> None:
    folder = saved(tiny("Mixtral", **WIDE), tmp_path / "model")
    path, matrices = folder / SINGLE, len(dense_matrices(build_skeleton(folder)))
    times = path.stat()

    def change(done: int, total: int) -> None:
        if done:  # the first matrix is written
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))

    with pytest.raises(CheckpointError, match="has changed while it was packed"):
        packed(folder, progress=change)
    assert len(list(packed_cache.rglob("*.safetensors"))) == 1
    assert packed(folder).files == matrices - 1


def test_unencodable_weights_raise(tmp_path: Path) -> None:
    model = tiny("Mixtral", **WIDE)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = 1e6
    folder = saved(model, tmp_path / "model")
    words = r"model.layers.1.self_attn.o_proj: .* output 3 for input 5 is 1000000"
    with pytest.raises(CheckpointError, match=words):
        packed(folder)


def test_command(tmp_path: Path) -> None:
    folder = str(saved(tiny("Mixtral", **WIDE), tmp_path / "model"))
    made = json.loads(run(folder, "--dense-formats", "int4,int8", "--json").stdout)
    assert made["relative_errors"] == {} and set(made["dense_errors"]) == {"int4", "int8"}
    said = run(folder, "--formats", "int4", "--dense-formats", "int4").stderr
    assert "dense int4: squared error" in said
    checked = json.loads(run(folder, "--check", "--json").stdout)
    assert (checked["experts"], checked["matrices"]) == (16, made["files"])
    only = json.loads(run(folder, "--check", "--dense-formats", "int8", "--json").stdout)
    assert (only["experts"], only["matrices"]) == (0, made["files"] // 2)
    (entry,) = entries()
    assert entry.contents == ("dense int4", "dense int8", "int4")
    assert entry.source == folder


def test_tokens_are_those_of_encoded_weights(tmp_path: Path) -> None:
    folder = saved(tiny("Olmoe", dtype=torch.bfloat16, **WIDE), tmp_path / "model")
    settings = LoadSettings(context=64, precision="int4", dense_precision="int4")
    ids = tokens(1, 9)

    def made() -> torch.Tensor:
        with load_model(folder, settings) as served:
            return served.generate(ids, max_new_tokens=8, do_sample=False)

    before = made()
    pack(build_skeleton(folder), [INT4], dense_formats=[INT4])
    assert torch.equal(made(), before)
