"""Whole models from GGUF files: transformers' own logits, in every type, and bad inputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_gguf import glm4_moe, gpt_oss
from tiny_gguf import VOCABULARY, configs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moefit.checkpoint.gguf.families import expert_of
from moefit.cli import app
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError
from moefit.evaluate.loading import load_full_model, locate
from moefit.gguf.write import write_gguf
from moefit.quant.format import NATIVE
from moefit.quant.scaled.matrix import ScaledMatrix
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.load import load_model
from moefit.train.data.tokenizer import train_bpe

gguf: Any = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
from gguf_files import read_file, write_file  # noqa: E402 - needs the package

CONFIGS = configs()
IDS = torch.arange(24).view(2, 12) * 11 % (VOCABULARY - 1)
MIXED = {"gate": "q8_0", "up": "q5_1", "down": "q4_0"}
DENSE = {"attn_q": "q4_1", "attn_k": "bf16", "attn_v": "f16", "attn_output": "q5_0"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file in float32 of each family, beside the folder that it was written from."""
    tokenizer = train_bpe(["some text to learn from"], VOCABULARY)
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        folder = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = folder.parent / f"{name}.gguf"
        write_gguf(folder, found[name], type="f32")
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def served_logits(path: Path, **settings: Any) -> torch.Tensor:
    with load_model(path, LoadSettings(**settings)) as served:
        return logits(served.model)


def mixed(name: str) -> str:
    """Return a type for a tensor; those of experts differ within a layer, and between layers."""
    if (expert := expert_of(name)) is not None:
        return MIXED[expert.part] if expert.layer == 0 else "q5_0"
    return DENSE.get(name.split(".")[-2], "f32") if name.endswith("weight") else "f32"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(files: dict[str, Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(files[name].parent / "model").eval()
    with load_model(files[name], LoadSettings()) as served:
        torch.testing.assert_close(logits(served.model), logits(model), atol=2e-5, rtol=1e-5)
        assert served.model.dtype == torch.float32
        assert len(served.tokenizer("some text")["input_ids"]) > 1
        mine, theirs = served.model.config, model.config
        for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings"):
            assert getattr(mine, key) == getattr(theirs, key)
        assert mine.eos_token_id == served.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
def test_quantised_and_mixed_types(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    metadata, tensors = read_file(files[name])
    types = {one: mixed(one) for one in tensors}
    path = write_file(tmp_path / "mixed.gguf", metadata, tensors, types)
    judge = write_file(tmp_path / "judge.gguf", *read_file(path))  # decoded by the package
    mine, expected = served_logits(path, dtype=torch.float32), served_logits(judge)
    torch.testing.assert_close(mine, expected, atol=0, rtol=0)
    assert not torch.allclose(expected, served_logits(files[name]), atol=1e-3)
    skeleton = build_skeleton(path)
    stored = skeleton.stored()
    assert set(stored.experts) == {*MIXED.values(), "q5_0"}
    assert {"q4_1", "q5_0", "float32"} <= set(stored.dense)
    assert skeleton.dtype == torch.bfloat16
    values_of = {one: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[one.upper()]] for one in
                 MIXED.values()}  # fmt: skip
    nbytes = sum(64 * 32 // values * size for values, size in values_of.values())
    assert stored.expert_bytes == nbytes


def test_glm4_moe(tmp_path: Path) -> None:
    model, metadata, tensors = glm4_moe(further=True)
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(path), logits(model), atol=2e-5, rtol=1e-5)
    assert build_skeleton(path).left_out()["mtp"][0] == 2
    with pytest.raises(UnsupportedModelError, match="other than sigmoid"):
        build_skeleton(
            write_file(tmp_path / "s.gguf", metadata | {"glm4moe.expert_gating_func": 1}, tensors)
        )


def test_gpt_oss(tmp_path: Path) -> None:
    model, metadata, tensors = gpt_oss()
    plain = write_file(tmp_path / "plain.gguf", metadata, tensors)
    torch.testing.assert_close(served_logits(plain), logits(model), atol=2e-5, rtol=1e-5)
    types = {name: "mxfp4" for name in tensors if name.endswith("_exps.weight")}
    types["blk.1.ffn_up_exps.weight"] = "q5_0"  # the parts of one matrix may differ
    path = write_file(tmp_path / "mxfp4.gguf", metadata, tensors, types)
    judge = served_logits(write_file(tmp_path / "judge.gguf", *read_file(path)))
    torch.testing.assert_close(
        served_logits(path, dtype=torch.float32), judge, atol=2e-5, rtol=1e-5
    )
    assert set(build_skeleton(path).stored().experts) == {"float32", "mxfp4", "mxfp4/q5_0"}


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "mxfp4"])
@pytest.mark.parametrize("family", ["olmoe", "gpt-oss"])
def test_slots_hold_the_own_codes_of_a_file(
    files: dict[str, Path], tmp_path: Path, family: str, type: str
) -> None:
    metadata, tensors = read_file(files["olmoe"]) if family == "olmoe" else gpt_oss()[1:]
    types = {name: type for name in tensors if name.endswith("_exps.weight")}
    skeleton = build_skeleton(write_file(tmp_path / "m.gguf", metadata, tensors, types))
    block = skeleton.blocks[0]
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, {block.name: block})
    slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
    for expert in (0, 3):
        store.read(block.name, expert, slot)
        decoded = NATIVE.decode(slot.tensors, block.layout.specs, torch.bfloat16)
        for short, value in store.native(block.name, expert).items():
            assert isinstance(slot.tensors[short], ScaledMatrix) == (value.dim() == 2)
            assert torch.equal(decoded[short], value)


def test_split_file_and_one_expert_per_tensor(files: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = read_file(files["mixtral"])
    expected = served_logits(files["mixtral"])
    first = write_file(tmp_path / "m.gguf", metadata, tensors, most=9)
    assert first.name.startswith("m-00001-of-")
    assert torch.equal(served_logits(first), expected)
    assert locate(str(first).replace("-00001-", "-00002-")) == first
    assert locate(str(tmp_path)) == first
    old = dict(tensors)  # as files of early 2024
    for name in tensors:
        if (which := expert_of(name)) is not None:
            for expert, matrix in enumerate(old.pop(name)):
                old[f"blk.{which.layer}.ffn_{which.part}.{expert}.weight"] = matrix
    assert torch.equal(served_logits(write_file(tmp_path / "old.gguf", metadata, old)), expected)


def test_commands_read_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = read_file(files["olmoe"])
    path = str(
        write_file(tmp_path / "q.gguf", metadata, tensors, {one: mixed(one) for one in tensors})
    )

    def run(*command: str) -> str:
        found = CliRunner().invoke(app, list(command))
        assert found.exit_code == 0, (found.output, found.exception)
        return found.stdout

    described = json.loads(run("describe", path, "--memory", "4GiB", "--json"))
    assert described["checkpoint"]["experts"] == ["q4_0", "q5_0", "q5_1", "q8_0"]
    assert "q8_0" in run("describe", path, "--memory", "4GiB")
    assert "q8_0" in run("describe", path)
    assert run("generate", path, "some text", "--max-new-tokens", "2")
    run("generate", path, "some", "--memory", "4GiB", "--precision", "int8", "--max-new-tokens=2")
    with pytest.raises(UnsupportedModelError, match="is a GGUF file, and only"):
        load_full_model(path)
    with pytest.raises(UnsupportedModelError, match="is a GGUF file, and only"):
        write_gguf(Path(path), tmp_path / "again.gguf")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'; .* olmoe, llama, qwen2moe"),
        ({"olmoe.expert_count": 0}, "without experts"),
        ({"olmoe.expert_count": 7}, "needs 7 experts|no tensor for"),
        ({"olmoe.expert_used_count": 9}, "num_experts_per_tok is 9"),
        ({"olmoe.block_count": 3}, "no tensor for|lacks"),
        ({"olmoe.block_count": 1}, "leaves out.*GGUF file's is in its metadata"),
        ({"olmoe.embedding_length": 32}, "another shape|becomes"),
        ({"olmoe.feed_forward_length": 64}, "another shape|becomes|cannot be made"),
        ({"olmoe.attention.head_count": 3}, "another shape|another|cannot be"),
        ({"olmoe.context_length": "long"}, "context_length='long'"),
        ({"olmoe.rope.dimension_count": 8}, "rotates 8 of the 16 units"),
        ({"olmoe.rope.scaling.type": "longrope"}, "'longrope'; none, linear and yarn"),
        ({"olmoe.expert_gating_func": 2}, "sets expert_gating_func"),
        ({"olmoe.expert_weights_scale": 2.5}, "sets expert_weights_scale"),
        ({"olmoe.rope.scaling.attn_factor": 1.5}, "sets rope.scaling.attn_factor"),
    ],
)
def test_metadata_that_contradicts_raises(
    files: dict[str, Path], tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    metadata, tensors = read_file(files["olmoe"])
    path = write_file(tmp_path / "bad.gguf", metadata | changes, tensors)
    with pytest.raises(MoefitError, match=match):
        build_skeleton(path)


def test_tensors_that_contradict_raise(files: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = read_file(files["olmoe"])

    def refused(changed: dict[str, Any], match: str, error: type[MoefitError]) -> None:
        path = write_file(tmp_path / "bad.gguf", metadata, changed)
        with pytest.raises(error, match=match):
            load_model(path, LoadSettings()).close()

    unknown = tensors | {"blk.0.attn_sinks.weight": tensors["blk.0.attn_norm.weight"]}
    refused(unknown, r"1 tensors that olmoe models do not.*attn_sinks", UnsupportedModelError)
    bias = tensors | {"blk.0.attn_q.bias": tensors["blk.0.attn_norm.weight"]}
    refused(bias, r"leaves out.*q_proj.bias", CheckpointError)
    for name in ("blk.1.ffn_down_exps.weight", "blk.1.attn_k.weight", "token_embd.weight"):
        refused({k: v for k, v in tensors.items() if k != name}, "lacks|no tensor|no matrix",
                CheckpointError)  # fmt: skip
    name = "blk.0.ffn_up_exps.weight"
    refused(tensors | {name: tensors[name][:4]}, "needs 6 experts|no tensor", CheckpointError)


def test_scale_that_is_not_finite_raises(files: dict[str, Path], tmp_path: Path) -> None:
    metadata, tensors = read_file(files["olmoe"])
    name = "blk.0.ffn_up_exps.weight"
    path = write_file(tmp_path / "bad.gguf", metadata, tensors, {name: "q8_0"})
    one = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    expert = one.n_bytes // 6
    data = bytearray(path.read_bytes())
    data[one.data_offset + 2 * expert + 34 : one.data_offset + 2 * expert + 36] = b"\x00\x7c"
    path.write_bytes(data)
    with load_model(path, LoadSettings()) as served, pytest.raises(CheckpointError) as raised:
        logits(served.model)
    assert "experts.2.up_proj.weight (q8_0): it has scales that are not finite" in str(raised.value)
