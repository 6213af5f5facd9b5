"""A DS-MoE that transformers opens without moefit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import set_biases, tiny_model, tokens
from transformers import OlmoeConfig, OlmoeForCausalLM

from moefit.dsmoe.model import DsMoeForCausalLM, register
from moefit.dsmoe.remote_code import CODE, export_standalone
from moefit.dsmoe.standalone import modeling_dsmoe
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.evaluate.loading import check_family

MOA = {"num_attention_experts": 2, "num_key_value_heads": 2, "router_hidden_size": 6}
MODELS = {
    "gated": {"inference_rule": "top_k:2"},
    "paper": {**MOA, "mlp_type": "gelu", "inference_rule": "threshold:0.8"},
    "renormalised": {**MOA, "inference_rule": "threshold:0.8:renormalize"},
    "scaled": {"routed_scaling_factor": 3.0, "inference_rule": "top_k:3:renormalize"},
    "batched": {**MOA, "inference_rule": "threshold_top_k:0.8"},
    "grap": {"router_type": "grap", "num_experts": 4, "inference_rule": "top_k:1"},
    "hash": {"router_type": "hash", "inference_rule": "top_k:1", "training_rule": "top_k:1"},
    "biased": {
        "score_correction_bias": True,
        "training_rule": "top_k:2",
        "inference_rule": "top_k:2",
    },
    "pregated": {"pregated": True, "num_hidden_layers": 3, "inference_rule": "top_k:2"},
    "previous": {**MOA, "pregated": "previous_token", "inference_rule": "top_k:2"},
    "embedding": {**MOA, "pregated": "previous_token_and_embedding", "inference_rule": "top_k:2"},
    "single": {"num_experts": 1, "qk_norm": True, "tie_word_embeddings": True},
}
WITHOUT_MOEFIT = """
import json, sys
sys.modules["moefit"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    ids = torch.tensor(json.loads(sys.argv[1]))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=mask, **how)
    found[folder] = [type(model).__module__, made.tolist()]
print(json.dumps(found))
"""


def test_a_process_without_moefit_generates_the_same_tokens(tmp_path):
    ids_BT = tokens(2, 6)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :2] = 0
    expected = {}
    for name, changes in MODELS.items():
        model = tiny_model(**changes)
        set_biases(model)
        folder = str(export_standalone(model, tmp_path / name))
        made = model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        expected[folder] = made.tolist()
    command = [sys.executable, "-c", WITHOUT_MOEFIT, json.dumps(ids_BT.tolist()), *expected]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, (module, made) in json.loads(done.stdout).items():
        assert module.startswith("transformers_modules.") and module.endswith("modeling_dsmoe")
        assert made == expected[folder], folder
    assert len({str(one) for one in expected.values()}) == len(MODELS)


@pytest.mark.parametrize("rule", ["dense", "top_k:2", "threshold:0.8", "threshold_top_k:0.8"])
def test_logits_with_padding(tmp_path, rule):
    """`threshold_top_k` leaves padding out of its mean."""
    model = tiny_model(**MOA, inference_rule=rule)
    folder = export_standalone(model, tmp_path / "out")
    plain = modeling_dsmoe.DsMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT, mask_BT = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask_BT[1, :4] = 0
    with torch.no_grad():
        logits, expected = (
            one(input_ids=ids_BT, attention_mask=mask_BT).logits for one in (plain, model)
        )
    real_BT = mask_BT.bool()
    assert torch.allclose(logits[real_BT], expected[real_BT], atol=1e-5)


def test_the_loss_is_the_cross_entropy(tmp_path):
    """Of the model in moefit without its routers' losses."""
    model = tiny_model(**MOA, inference_rule="top_k:2")
    folder = export_standalone(model, tmp_path / "out")
    plain = modeling_dsmoe.DsMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT = tokens(3, 7)
    labels_BT = ids_BT.clone()
    labels_BT[1, :4] = -100
    with torch.no_grad():
        loss = plain(input_ids=ids_BT, labels=labels_BT).loss
        expected = model(input_ids=ids_BT, labels=labels_BT)
    assert torch.allclose(loss, expected.loss - expected.aux_loss, atol=1e-5)
    assert plain(input_ids=ids_BT).loss is None


@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_router_logits": True},
        {"return_dict": False},
        {"inputs_embeds": torch.zeros(1, 2, 3)},
    ],
)
def test_outputs_that_are_not_computed_are_refused(asked):
    sizes = {"vocab_size": 32, "num_key_value_heads": 8, "head_dim": 8, "num_hidden_layers": 1}
    plain = modeling_dsmoe.DsMoeForCausalLM(modeling_dsmoe.DsMoeConfig(**sizes))
    with pytest.raises(ValueError, match=f"{next(iter(asked))}.*load the folder with moefit"):
        plain(input_ids=tokens(1, 3), **asked)


def test_moefit_reads_the_folder_without_running_its_code(tmp_path):
    folder = export_standalone(tiny_model(**MOA), tmp_path / "out", dtype=torch.bfloat16)
    (folder / CODE).write_text("raise SystemExit('run')")
    register()
    assert check_family(folder) == "dsmoe"
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_dsmoe.DsMoeConfig"
    assert config["dtype"] == "bfloat16"


def test_biases_of_choices_are_written_in_float32(tmp_path):
    """Rounded to 16 bits they would choose other experts, and readers keep them in float32."""
    model = tiny_model(**MODELS["biased"])
    set_biases(model)
    expected = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers]
    folder = export_standalone(model, tmp_path / "half", dtype=torch.bfloat16)
    again = DsMoeForCausalLM.from_pretrained(folder, dtype="auto")
    assert again.dtype == torch.bfloat16
    export_standalone(again, tmp_path / "again")
    for one in (folder, tmp_path / "again"):
        found = load_file(one / "model.safetensors")
        for number, bias_E in enumerate(expected):
            name = f"model.layers.{number}.mlp.gate.e_score_correction_bias"
            assert torch.equal(found[name], bias_E)


def test_refused(tmp_path, monkeypatch):
    olmoe = OlmoeForCausalLM(OlmoeConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match="opens it without code"):
        export_standalone(olmoe, tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_standalone(tiny_model(), tmp_path / "used")
    monkeypatch.setattr(modeling_dsmoe.DsMoeRMSNorm, "forward", lambda self, x: x)
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_standalone(tiny_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
