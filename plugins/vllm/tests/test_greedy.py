"""Greedy equality of vLLM and transformers for tiny DS-MoE models, and rules that are refused."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import moefit_vllm
import pytest
import torch
from moefit_vllm.routing import Rule
from transformers import OlmoeForCausalLM
from vllm import LLM, SamplingParams

CODE = Path(__file__).parents[3] / "src/moefit/dsmoe/standalone/modeling_dsmoe.py"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "architectures": ["DsMoeForCausalLM"],
}
MOA = {"num_attention_experts": 2, "router_hidden_size": 8, "mlp_type": "gelu"}
MODELS = {
    "fused-top-k": {"inference_rule": "top_k:2", "qk_norm": True, "routed_scaling_factor": 4.0},
    "fused-threshold": {"inference_rule": "threshold:0.9:renormalize", "tie_word_embeddings": True},
    "paper-threshold": {**MOA, "inference_rule": "threshold:0.9"},
    "paper-dense": {**MOA, "inference_rule": "dense"},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 3, 14]]
MOEFIT = os.environ.get("MOEFIT_PYTHON")


def reference():
    """Return the module that moefit copies beside weights, which imports nothing of moefit."""
    spec = importlib.util.spec_from_file_location("modeling_dsmoe", CODE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_dsmoe"] = module
    spec.loader.exec_module(module)
    return module


def saved(name, folder):
    """Save a model with random weights; return the tokens that it generates greedily."""
    code = reference()
    torch.manual_seed(0)
    model = code.DsMoeForCausalLM(code.DsMoeConfig(**SIZES, **MODELS[name])).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return greedily(model)


def greedily(model):
    """Return the tokens that a transformers model generates."""
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    return [model.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist() for ids in PROMPTS]


def generated(folder, **parallel):
    """Return what vLLM generates greedily."""
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        **parallel,
    )
    made = llm.generate(
        [{"prompt_token_ids": ids} for ids in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
    )
    return [list(one.outputs[0].token_ids) for one in made]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    """By rule, with gated and GELU experts, with and without attention experts."""
    assert saved(name, tmp_path) == generated(tmp_path)


@pytest.mark.parametrize("name", ["fused-top-k", "paper-threshold"])
def test_two_processes_generate_the_same(name, tmp_path):
    """Tensor parallelism, in a process of its own, which starts the others."""
    expected = saved(name, tmp_path)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.skipif(MOEFIT is None, reason="MOEFIT_PYTHON, a Python with moefit, is not set")
def test_an_exported_olmoe_generates_the_same(tmp_path):
    """The model that moefit ships, which vLLM's own class serves."""
    folder = str(tmp_path / "olmoe")
    command = [MOEFIT, "-m", "moefit", "export", "reference", folder, "--experts-per-token", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert greedily(model) == generated(folder)


@pytest.mark.parametrize(("version", "said"), [("0.31.2", True), ("0.32.0", False)])
def test_an_untested_version_is_named(monkeypatch, caplog, version, said):
    """A warning, since most of them work."""
    monkeypatch.setattr(moefit_vllm, "_vllm_version", lambda: version)
    with caplog.at_level(logging.WARNING, logger="moefit_vllm"):
        moefit_vllm.register()
    assert (f"tested with vLLM 0.32, and this is {version}" in caplog.text) == said


def test_rules_of_a_batch_are_refused():
    """The error says why and what works."""
    with pytest.raises(ValueError, match="depends on which requests share a step"):
        Rule.parse("threshold_top_k:0.48")


@pytest.mark.parametrize("text", ["top_k", "top_k:renormalize", "top_k:0", "top_k:x", "best:2"])
def test_what_is_no_rule_is_refused(text):
    """Also a rule without its number."""
    with pytest.raises(ValueError, match="is none; use dense, top_k:K or threshold:EPS"):
        Rule.parse(text)


if __name__ == "__main__":
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else vLLM wants a NUMA node per process
    sys.stdout.write(json.dumps(generated(sys.argv[1], tensor_parallel_size=2)) + "\n")
