import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from moefit.dsmoe import export
from moefit.dsmoe.dense_experts import register_dense_experts
from moefit.dsmoe.export import export_olmoe, olmoe_incompatibilities
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError

IDS = tokens(2, 9)


def exportable(**changes) -> DsMoeForCausalLM:
    return tiny_model(**({"qk_norm": True, "inference_rule": "top_k:2"} | changes))


def stock_model(intermediate_size: int = 8) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=37, hidden_size=16, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_experts=5, num_experts_per_tok=5, initializer_range=0.4,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored(folder: Path, **options) -> OlmoeForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is OlmoeForCausalLM
    return model


def assert_nothing_left(out_dir: Path) -> None:
    assert list(out_dir.parent.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inference_rule": "dense"},
        {"routed_scaling_factor": 3.0},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 321.0}},
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3]},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_exported_checkpoint_matches_in_transformers(changes, k: int, tmp_path: Path):
    model = exportable(**changes)
    assert export_olmoe(model, tmp_path / "out", experts_per_token=k) == tmp_path / "out"
    loaded = stored(tmp_path / "out")
    model.set_inference_rule(f"top_k:{k}")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    for name in ("rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert loaded.config.num_experts_per_tok == k
    assert loaded.config.norm_topk_prob is False
    assert loaded.config.tie_word_embeddings is False
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_renormalize_becomes_norm_topk_prob(tmp_path: Path) -> None:
    model = exportable(inference_rule="top_k:2:renormalize")
    with pytest.warns(UserWarning, match="norm_topk_prob=True .vLLM and llama.cpp do not"):
        export_olmoe(model, tmp_path / "out", experts_per_token=2)
    loaded = stored(tmp_path / "out")
    assert loaded.config.norm_topk_prob is True
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_ignored_rms_norm_eps_warns(tmp_path: Path) -> None:
    model = exportable(rms_norm_eps=1e-2)
    with pytest.warns(UserWarning, match=r"rms_norm_eps=0.01 .vLLM computes with 1e-05"):
        export_olmoe(model, tmp_path / "out", experts_per_token=2)
    torch.testing.assert_close(
        logits(stored(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_sizes_for_eager_experts_warn(tmp_path: Path) -> None:
    for name, model in {"ours": exportable(intermediate_size=6), "stock": stock_model(6)}.items():
        with pytest.warns(UserWarning, match="intermediate_size=6, not a multiple of 8"):
            export_olmoe(model, tmp_path / name, experts_per_token=2)
    loaded = stored(tmp_path / "ours", experts_implementation="eager")
    torch.testing.assert_close(
        logits(loaded), logits(exportable(intermediate_size=6)), rtol=1e-4, atol=1e-4
    )


def test_densely_trained_olmoe_gets_k(tmp_path: Path) -> None:
    model = stock_model()
    model.set_experts_implementation(register_dense_experts())
    export_olmoe(model, tmp_path / "out", experts_per_token=2)
    sparse = OlmoeForCausalLM(OlmoeConfig(**model.config.to_dict() | {"num_experts_per_tok": 2}))
    sparse.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        logits(stored(tmp_path / "out")), logits(sparse), rtol=1e-4, atol=1e-4
    )
    assert model.config.num_experts_per_tok == 5
    assert "moefit" not in (tmp_path / "out" / "config.json").read_text()


def test_bfloat16_export_rounds_weights(tmp_path: Path) -> None:
    model = exportable()
    export_olmoe(model, tmp_path / "out", experts_per_token=2, dtype=torch.bfloat16)
    loaded = stored(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(dict(loaded.state_dict()), rounded, rtol=0, atol=0)
    assert model.dtype == torch.float32


def test_bfloat16_model_stays_bfloat16(tmp_path: Path) -> None:
    export_olmoe(exportable().bfloat16(), tmp_path / "out", experts_per_token=2)
    assert stored(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_export_keeps_model_and_random_state(tmp_path: Path) -> None:
    model = exportable(tie_word_embeddings=True).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    export_olmoe(model, tmp_path / "out", experts_per_token=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


PLAIN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
expected = torch.load(folder + "/../expected.pt")
model = AutoModelForCausalLM.from_pretrained(folder)
logits = model(expected["ids"]).logits
torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
generated = model.generate(expected["ids"], do_sample=False, max_new_tokens=5)
assert torch.equal(generated, expected["generated"])
assert AutoTokenizer.from_pretrained(folder)("b a")["input_ids"] == [1, 0]
assert not any(name.startswith("moefit") for name in sys.modules)
"""


def tiny_tokenizer(size: int = 3) -> PreTrainedTokenizerFast:
    vocabulary = {chr(97 + n): n for n in range(size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_export_loads_without_moefit(tmp_path: Path) -> None:
    model = exportable(tie_word_embeddings=True, num_key_value_heads=2)
    export_olmoe(model, tmp_path / "out", experts_per_token=2, tokenizer=tiny_tokenizer())
    generated = model.generate(IDS, do_sample=False, max_new_tokens=5)
    expected = {"ids": IDS, "logits": logits(model), "generated": generated}
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, str(tmp_path / "out")]
    subprocess.run(command, check=True)


IMPOSSIBLE = {
    "num_attention_experts": 2,
    "num_key_value_heads": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "mlp_type": "gelu",
    "router_hidden_size": 6,
    "qk_norm": False,
    "pregated": True,
    "inference_rule": "threshold:0.5",
}


def test_all_incompatibilities_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        export_olmoe(exportable(**IMPOSSIBLE), tmp_path / "out", experts_per_token=4)
    message = str(caught.value)
    for part in (
        "num_attention_experts=2, but it has no mixture of attention heads: 1",
        "mlp_type='gelu', but its experts have three matrices: 'swiglu'",
        "router_hidden_size=6, but its router is linear: null",
        "qk_norm=False, but it always normalises queries and keys: True",
        "pregated=True, but its routers are given the inputs of the token that they route in their "
        "own block: false",
        "head_dim=4 times num_attention_heads=2, but its heads divide hidden_size=16: head_dim=8",
        "inference_rule='threshold:0.5', but it has one K",
        "set_inference_rule('top_k:4')",
    ):
        assert part in message
    assert "num_experts=" not in message
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "inference_rule": "dense"},
        {"inference_rule": "threshold_top_k:1"},
        {"pregated": "previous_token"},
        {"score_correction_bias": True, "training_rule": "top_k:2"},
    ],
)
def test_single_incompatibility_raises(changes: dict) -> None:
    assert len(olmoe_incompatibilities(exportable(**changes).config, 1)) == 1


def test_exportable_model_has_no_incompatibilities() -> None:
    assert olmoe_incompatibilities(exportable().config, 2) == []


@pytest.mark.parametrize("make", [exportable, stock_model])
@pytest.mark.parametrize("k", [0, -1, 6])
def test_invalid_k_raises(make, k: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"experts_per_token={k}, .* 5 experts; 1 to 5 work"):
        export_olmoe(make(), tmp_path / "out", experts_per_token=k)
    assert_nothing_left(tmp_path / "out")


def test_other_models_raise(tmp_path: Path) -> None:
    other = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="a Linear cannot be written as OLMoE"):
        export_olmoe(other, tmp_path / "out", experts_per_token=1)  # type: ignore[arg-type]


def test_too_large_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has 38 tokens, but .* vocab_size is 37"):
        export_olmoe(
            exportable(), tmp_path / "out", experts_per_token=2, tokenizer=tiny_tokenizer(38)
        )
    assert_nothing_left(tmp_path / "out")


def test_non_empty_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for out_dir in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            export_olmoe(exportable(), out_dir, experts_per_token=2)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_empty_folder_and_missing_parents_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out_dir in (tmp_path / "empty", tmp_path / "a" / "b"):
        export_olmoe(exportable(), str(out_dir), experts_per_token=2)
        assert json.loads((out_dir / "config.json").read_text())["model_type"] == "olmoe"


def test_unwritable_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_olmoe(exportable(), tmp_path / "file" / "out", experts_per_token=2)


def test_full_disk_for_tokenizer_raises(tmp_path: Path, monkeypatch) -> None:
    def full(self: PreTrainedTokenizerFast, folder: Path) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: the tokenizer .*No space left"):
        export_olmoe(
            exportable(), tmp_path / "out", experts_per_token=2, tokenizer=tiny_tokenizer()
        )
    assert_nothing_left(tmp_path / "out")


def test_leftovers_of_killed_export_are_replaced(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export.os, "getpid", lambda: 4)
    (tmp_path / ".out.4.partial").mkdir()
    (tmp_path / ".out.4.partial" / "model.safetensors").write_text("half")
    (tmp_path / ".out.4.partial" / "stale.txt").write_text("half")
    export_olmoe(exportable(), tmp_path / "out", experts_per_token=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.txt").exists()


def break_a_norm(model: OlmoeForCausalLM) -> None:
    model.model.norm.weight.data[3] += 1


def break_the_rule(model: OlmoeForCausalLM) -> None:
    model.config.norm_topk_prob = True


def break_the_eps(model: OlmoeForCausalLM) -> None:
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_a_norm, "changed 1 of 25 weights, among them model.norm.weight"),
        (break_the_rule, "logits differ from the original's by"),
        (break_the_eps, "logits differ from the original's by"),
    ],
)
def test_checkpoint_with_other_logits_is_not_written(
    damage, message: str, tmp_path: Path, monkeypatch
) -> None:
    save = OlmoeForCausalLM.save_pretrained

    def damaged_save(self: OlmoeForCausalLM, folder: Path) -> None:
        twin = OlmoeForCausalLM(OlmoeConfig(**self.config.to_dict()))
        twin.load_state_dict(self.state_dict())
        damage(twin)
        save(twin, folder)

    monkeypatch.setattr(OlmoeForCausalLM, "save_pretrained", damaged_save)
    with pytest.raises(CheckpointError, match=message):
        export_olmoe(exportable(), tmp_path / "out", experts_per_token=2)
    assert_nothing_left(tmp_path / "out")


def test_nan_weights_are_not_written(tmp_path: Path) -> None:
    model = exportable()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"Does the model contain NaNs\?"):
        export_olmoe(model, tmp_path / "out", experts_per_token=2)
    assert_nothing_left(tmp_path / "out")


def test_export_without_problems_does_not_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_olmoe(exportable(), tmp_path / "out", experts_per_token=2)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {}])
def test_heads_without_groups_compute_the_same(changes, tmp_path: Path):
    model = exportable(**changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    export_olmoe(model, tmp_path / "out", experts_per_token=2, grouped=False)
    loaded = stored(tmp_path / "out")
    assert loaded.config.num_key_value_heads == model.config.num_attention_heads
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_olmoe_without_groups_computes_the_same(tmp_path: Path):
    grouped = exportable(num_key_value_heads=2)
    export_olmoe(grouped, tmp_path / "olmoe", experts_per_token=2)
    export_olmoe(stored(tmp_path / "olmoe"), tmp_path / "out", experts_per_token=2, grouped=False)
    torch.testing.assert_close(
        logits(stored(tmp_path / "out")), logits(grouped), rtol=1e-4, atol=1e-4
    )
