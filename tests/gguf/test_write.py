"""GGUF files: read back with the `gguf` package and compared with the checkpoint; bad inputs."""

import json
import shutil
import sys

import numpy as np
import pytest
import quantised
import torch
from tiny_gguf import OLMOE, VOCABULARY, configs
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
)

from moefit.checkpoint.gguf.families import expert_name
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.gguf import write
from moefit.gguf.families import family_of
from moefit.gguf.write import TYPES, write_gguf
from moefit.train.data.tokenizer import train_bpe

gguf = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")

CONFIGS = configs()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family."""
    tokenizer = train_bpe(["some text to learn from"], VOCABULARY)
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def stored(path):
    """Return the file's metadata, and its tensors dequantised to float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        one.name: gguf.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1].tolist())
        for one in reader.tensors
    }
    return fields, tensors


def pairs_of_halves(weight, heads):
    """Return rows in llama's order, written out: halves of a head become neighbours."""
    width = len(weight) // heads
    order = [
        head * width + half * (width // 2) + at
        for head in range(heads)
        for at in range(width // 2)
        for half in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_equal_the_checkpoints(folders, tmp_path, name):
    path = tmp_path / "model.gguf"
    made = write_gguf(folders[name], path, type="f32")
    fields, tensors = stored(path)
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    assert made.nbytes == path.stat().st_size
    assert fields["general.architecture"] == made.architecture
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        gates, ups = np.split(state[f"{prefix}.mlp.experts.gate_up_proj"], 2, axis=1)
        expected = {
            expert_name(layer, "gate"): gates,
            expert_name(layer, "up"): ups,
            expert_name(layer, "down"): state[f"{prefix}.mlp.experts.down_proj"],
            f"blk.{layer}.ffn_gate_inp.weight": state[f"{prefix}.mlp.gate.weight"],
            f"blk.{layer}.ffn_norm.weight": state[f"{prefix}.post_attention_layernorm.weight"],
            f"blk.{layer}.attn_v.weight": state[f"{prefix}.self_attn.v_proj.weight"],
        }
        query = state[f"{prefix}.self_attn.q_proj.weight"]
        key = state[f"{prefix}.self_attn.k_proj.weight"]
        if name == "mixtral":
            query = pairs_of_halves(query, config.num_attention_heads)
            key = pairs_of_halves(key, config.num_key_value_heads)
        expected |= {f"blk.{layer}.attn_q.weight": query, f"blk.{layer}.attn_k.weight": key}
        if name == "qwen2moe":
            shared = state[f"{prefix}.mlp.shared_expert_gate.weight"]
            expected[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = shared[0]
            expected[f"blk.{layer}.attn_q.bias"] = state[f"{prefix}.self_attn.q_proj.bias"]
        for tensor, values in expected.items():
            np.testing.assert_array_equal(tensors[tensor], values, err_msg=tensor)
    np.testing.assert_array_equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    weights = sum(values.size for values in state.values())
    assert sum(values.size for values in tensors.values()) == weights


@pytest.mark.parametrize(
    ("name", "kind", "declared"),
    [
        ("qwen2moe", "fp8-blocks", True),
        ("qwen3moe", "fp8-tensor", False),
        ("qwen2moe", "gptq", True),
        ("qwen3moe", "awq", True),
        ("olmoe", "nvfp4-modelopt", True),
    ],
)
def test_quantised_checkpoints_are_decoded(folders, tmp_path, name, kind, declared):
    """The plain folder, in float32, has the values that the quantised one decodes to.

    The quantised one's model computes in bfloat16, to which no weight may be rounded on the way.
    """
    plain = tmp_path / "plain"
    shutil.copytree(folders[name], plain)
    store, config = quantised.KINDS[kind]
    folder = quantised.quantise(plain, tmp_path / "quantised", store, config if declared else None)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    for type in ("f32", "q8_0"):
        write_gguf(plain, tmp_path / f"plain-{type}.gguf", type=type, with_tokenizer=False)
        write_gguf(folder, tmp_path / f"own-{type}.gguf", type=type, with_tokenizer=False)
        _, expected = stored(tmp_path / f"plain-{type}.gguf")
        _, found = stored(tmp_path / f"own-{type}.gguf")
        assert found.keys() == expected.keys()
        for tensor, values in expected.items():
            np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


def test_a_gguf_file_is_not_written_again(folders, tmp_path):
    write_gguf(folders["olmoe"], tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="is a GGUF file"):
        write_gguf(tmp_path / "model.gguf", tmp_path / "again.gguf")


def test_metadata(folders, tmp_path):
    write_gguf(folders["qwen3moe"], tmp_path / "model.gguf", type="bf16")
    fields, _ = stored(tmp_path / "model.gguf")
    of_family = {k.removeprefix("qwen3moe."): v for k, v in fields.items() if "qwen3moe." in k}
    assert of_family == {
        "vocab_size": VOCABULARY,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 32,
        "expert_feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "expert_count": 6,
        "expert_used_count": 2,
    }
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert fields["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize("kind", TYPES)
def test_types(folders, tmp_path, kind):
    write_gguf(folders["olmoe"], tmp_path / "model.gguf", type=kind)
    types = {
        one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    _, tensors = stored(tmp_path / "model.gguf")
    _, exact = stored(written_once(folders["olmoe"], tmp_path))
    for name, values in tensors.items():
        exempt = "norm" in name or "ffn_gate_inp" in name
        assert types[name] == ("F32" if exempt else kind.upper())
        error = np.linalg.norm(values - exact[name]) / np.linalg.norm(exact[name])
        assert error <= (0 if types[name] == "F32" else 0.004 if "16" in kind else 0.12), name


def written_once(folder, tmp_path):
    if not (tmp_path / "exact.gguf").exists():
        write_gguf(folder, tmp_path / "exact.gguf", type="f32")
    return tmp_path / "exact.gguf"


def test_tied_embeddings_are_written_twice(tmp_path):
    config = OlmoeConfig(**OLMOE, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32", with_tokenizer=False)
    fields, tensors = stored(tmp_path / "model.gguf")
    np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert fields["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob=True: False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads=2: num_attention_heads=4"),
        ("olmoe", {"attention_bias": True}, "attention_bias"),
        ("olmoe", {"hidden_act": "gelu"}, "'silu'"),
        ("mixtral", {"sliding_window": 64}, "sliding_window"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob=True: False"),
        ("qwen2moe", {"mlp_only_layers": [0]}, "without experts"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob=False: True"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "without experts"),
        (
            "qwen3moe",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='linear'",
        ),
    ],
)
def test_settings_that_llama_cpp_ignores_are_refused(folders, tmp_path, name, changes, words):
    folder = tmp_path / "model"
    shutil.copytree(folders[name], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModelError, match=words):
        write_gguf(folder, tmp_path / "model.gguf")


def test_other_families_are_refused_with_those_that_work(tmp_path):
    config = DeepseekV3Config(num_hidden_layers=1)
    with torch.device("meta"):
        config = DeepseekV3ForCausalLM(config).config
    with pytest.raises(UnsupportedModelError, match="olmoe, mixtral, qwen2_moe, qwen3_moe can"):
        family_of(config)


def test_bad_requests_leave_no_file(folders, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"q8_0.*llama-quantize"):
        write_gguf(folders["olmoe"], path, type="q4_k_m")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        write_gguf(tmp_path, path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(CheckpointError, match="has 1 left"):
        write_gguf(folders["olmoe"], path)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_gguf(folders["olmoe"], tmp_path / "file" / "model.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    path.write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        write_gguf(folders["olmoe"], path)
    assert path.read_text() == "precious"


def test_a_damaged_checkpoint_leaves_no_file(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["olmoe"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        write_gguf(folder, tmp_path / "model.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_f16_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**OLMOE))
    model.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"1e\+05, beyond f16's 65,504; use bf16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", with_tokenizer=False)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", type="bf16", with_tokenizer=False)


def test_rows_that_do_not_divide_into_blocks(tmp_path):
    config = OlmoeConfig(**OLMOE | {"intermediate_size": 40})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"ffn_down_exps.weight has rows of 40 weights"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", type="q8_0", with_tokenizer=False)


def test_the_package_is_named_where_it_is_missing(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[gguf\]'"):
        write_gguf(folders["olmoe"], tmp_path / "model.gguf")
