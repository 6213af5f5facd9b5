"""GGUF files in Q4_K and Q6_K, as llama.cpp's Q4_K_M mixes them, served from their own codes.

The judge is the same file with every tensor decoded to float32 by the `gguf` package.
"""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from k_quants import random_blocks
from tiny_gguf import VOCABULARY, configs
from tiny_served import settled, with_slots
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moefit
from moefit.checkpoint.gguf.encoding import GateAboveUp, GgmlBlocks, Interleaved
from moefit.checkpoint.gguf.families import expert_of
from moefit.checkpoint.gguf.types import BY_NAME
from moefit.checkpoint.safetensors import Span
from moefit.cli import app
from moefit.errors import CheckpointError
from moefit.gguf.write import write_gguf
from moefit.moe.families import MoeBlock, ScaledCodes
from moefit.quant.format import DECODED, NATIVE
from moefit.quant.scaled.k_quants import KQuantMatrix
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf import skeleton as skeleton_module
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed.build import pack
from moefit.serve.packed.store import open_packed
from moefit.train.data.tokenizer import train_bpe

gguf: Any = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
from gguf_files import read_file, write_file  # noqa: E402 - needs the package

WIDTH, INNER, EXPERTS, LAYERS = 256, 512, 4, 3
PROMPTS = torch.arange(6 * 12).view(6, 12) * 37 % (VOCABULARY - 1)
BF16 = torch.bfloat16


def type_of(name: str) -> str:
    """Return a tensor's type: down projections take turns, and so do values of attention."""
    if (expert := expert_of(name)) is not None:
        return "q6_k" if expert.part == "down" and expert.layer != 1 else "q4_k"
    return {"attn_q": "q4_k", "attn_output": "q4_k", "attn_v": "q6_k"}.get(
        name.split(".")[-2], "f32"
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Qwen3-MoE; its dense weights are in float32, or in k-quants as well."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
    config = configs(num_hidden_layers=LAYERS)["qwen3moe"]
    for name, value in (sizes | {"head_dim": 64}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    train_bpe(["some text to learn from"], VOCABULARY).save_pretrained(folder / "plain")
    write_gguf(folder / "plain", folder / "plain.gguf", type="f32")
    metadata, tensors = read_file(folder / "plain.gguf")
    types = {name: type_of(name) for name in tensors}
    for seed, (name, type) in enumerate(types.items()):
        if type != "f32":
            *rows, cols = tensors[name].shape
            blocks = random_blocks(type, int(np.prod(rows)), cols, seed=seed, size=0.07)
            tensors[name] = blocks.numpy().reshape(*rows, -1)
    return write_file(folder / "small-Q4_K_M.gguf", metadata, tensors, types)


@pytest.fixture(scope="module")
def exact(file: Path) -> tuple[Tensor, Tensor]:
    """Logits and greedy tokens in float32 of the file decoded by the package."""
    judge = write_file(file.parent / "judge.gguf", *read_file(file))
    return answers(judge, dtype=torch.float32)


@pytest.fixture(scope="module")
def rounded(file: Path, exact: tuple[Tensor, Tensor]) -> float:
    """The error of a model whose weights are decoded values in bfloat16."""
    return error(answers(file, precision="decoded")[0], exact[0])


def answers(path: Path, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return logits of the prompts, and 8 greedy tokens after each."""
    with moefit.load(path, context=128, **settings) as served:
        return of(served)


def of(served: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = served.model(PROMPTS).logits.float()
        tokens = served.model.generate(
            PROMPTS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return found, tokens[:, PROMPTS.shape[1] :]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt())


def held(path: Path, layer: int, expert: int) -> tuple[Slot, ExpertStore, Any]:
    skeleton = build_skeleton(path)
    block = skeleton.blocks[layer]
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, {block.name: block})
    slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
    store.read(block.name, expert, slot)
    return slot, store, block


@pytest.mark.parametrize("layer", range(LAYERS))
def test_slots_take_the_bytes_of_the_file(file: Path, layer: int) -> None:
    for expert in (0, EXPERTS - 1):
        slot, store, block = held(file, layer, expert)
        specs = block.layout.specs
        assert all(isinstance(one, KQuantMatrix) for one in slot.tensors.values())
        down = BY_NAME["q4_k" if layer == 1 else "q6_k"]
        own = (2 * BY_NAME["q4_k"].nbytes + down.nbytes) * INNER * WIDTH // 256
        assert own <= slot.nbytes < own + 4096 + 4 * 64, "whole pages, and lines of caches"
        assert slot.nbytes < 0.36 * DECODED.nbytes(specs)
        decoded = NATIVE.decode(slot.tensors, specs, BF16)
        for short, value in store.native(block.name, expert).items():
            assert torch.equal(decoded[short], value)


@pytest.mark.usefixtures("computing")
def test_served_model_is_as_near_as_decoded_values(
    file: Path, exact: tuple[Tensor, Tensor], rounded: float
) -> None:
    """In bfloat16, in which models are served, with all experts in memory and with one a layer."""
    with moefit.load(file, mode="exact", context=128) as served:
        assert served.report()["checkpoint"]["held"] == ["q4_k", "q6_k"]
        one = next(iter(served.blocks.values()))
        assert all(slot.format == NATIVE for slot in one.slots.values())
        found = of(served)[0]
        served.set_memory(with_slots(served, 1))
        settled(served)
        for logits in (found, of(served)[0]):
            assert error(logits, exact[0]) <= 1.2 * rounded


@pytest.mark.usefixtures("computing")
def test_greedy_tokens_are_those_of_the_decoded_model(
    file: Path, exact: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all else in float32, so that only products with experts' codes are rounded."""
    own = skeleton_module._as_stored

    def in_any_dtype(block: MoeBlock, experts: Any) -> MoeBlock:
        specs = block.layout.specs
        narrow = replace(block, layout=copy(block.layout))
        narrow.layout.specs = {short: replace(one, dtype=BF16) for short, one in specs.items()}
        made = own(narrow, experts)
        made.layout.specs = {
            short: replace(one, dtype=specs[short].dtype)
            for short, one in made.layout.specs.items()
        }
        return made

    monkeypatch.setattr(skeleton_module, "_as_stored", in_any_dtype)
    with moefit.load(file, mode="exact", context=128, dtype=torch.float32) as served:
        assert served.report()["checkpoint"]["held"] == ["q4_k", "q6_k"]
        found = of(served)
        served.set_memory(with_slots(served, 1))
        settled(served)
        for logits, tokens in (found, of(served)):
            assert float((logits - exact[0]).abs().max()) <= 1e-3 * float(exact[0].abs().max())
            assert torch.equal(tokens, exact[1])


def test_commands_name_the_types(file: Path) -> None:
    found = CliRunner().invoke(app, ["describe", str(file), "--memory", "4GiB", "--json"])
    assert found.exit_code == 0, found.output
    stored = json.loads(found.stdout)["checkpoint"]
    assert stored["experts"] == stored["held"] == ["q4_k", "q6_k"]
    assert [*stored["held_in"].values()] == [["q4_k", "q6_k"], ["q4_k"], ["q4_k", "q6_k"]]


def test_estimate_counts_own_bytes(file: Path) -> None:
    """Blocks differ: slots of the one whose down projection is in Q4_K are smaller."""
    skeleton = build_skeleton(file)
    budget = memory_budget(skeleton, LoadSettings(context=128))
    sizes = [one.slot_bytes for one in budget.blocks]
    assert sizes == [NATIVE.nbytes(block.layout.specs) for block in skeleton.blocks]
    assert sizes[0] == sizes[2] > sizes[1]
    with moefit.load(file, context=128) as served:
        assert {one.block_slot_bytes for one in served.blocks.values()} == {*sizes}


@pytest.mark.usefixtures("packed_cache")
def test_packed_experts_are_the_same(file: Path) -> None:
    skeleton = build_skeleton(file)
    assert pack(skeleton, [NATIVE]).files == LAYERS
    blocks = {block.name: block for block in skeleton.blocks}
    packed = open_packed(skeleton, [NATIVE])
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks, packed)
    for layer, block in enumerate(skeleton.blocks):
        slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
        store.read(block.name, 1, slot)
        for short, expected in held(file, layer, 1)[0].tensors.items():
            matrix = slot.tensors[short]
            assert isinstance(matrix, KQuantMatrix) and isinstance(expected, KQuantMatrix)
            assert torch.equal(matrix.dense(), expected.dense())
            assert torch.equal(matrix.codes_RB, expected.codes_RB)


def test_scales_that_are_not_finite_are_an_error_of_one_expert(file: Path, tmp_path: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    one = next(one for one in gguf.GGUFReader(file).tensors if one.name == name)
    data, at = bytearray(file.read_bytes()), one.data_offset + 2 * one.n_bytes // EXPERTS
    data[at + 144 + 2 : at + 144 + 4] = b"\x00\x7c"  # m of its second block
    (path := tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"experts\.2\.up_proj\.weight \(q4_k\): it has scales that are not"
    ):
        held(path, 1, 2)
    held(path, 1, 1)


@pytest.mark.parametrize("type", ["q4_k", "q6_k"])
@pytest.mark.parametrize("kind", [GateAboveUp, Interleaved])
def test_gate_and_up_of_one_matrix(type: str, kind: type[GateAboveUp] | type[Interleaved]) -> None:
    """As Granite and gpt-oss have them; rows of codes are output units in any case."""
    turned = kind is Interleaved
    blocks = GgmlBlocks(type=type, transposed=turned)
    parts = {
        part: random_blocks(type, 24, 512, seed=seed) for seed, part in enumerate(("gate", "up"))
    }
    spans = {
        part: Span(
            name=part,
            path=Path(),
            offset=0,
            nbytes=one.nbytes,
            dtype=one.dtype,
            shape=tuple(one.shape),
        )
        for part, one in parts.items()
    }
    encoding = kind(gate=blocks, up=blocks)
    codes = ScaledCodes(type, type, "float16", 256, transposed=turned)
    assert encoding.scaled_codes(spans) == codes
    matrix = KQuantMatrix.empty(48, 512, codes)
    matrix.fill(0, encoding.stored_codes(parts))
    values = torch.empty(encoding.shape(spans))
    encoding.decode_into(parts, values)
    assert torch.equal(matrix.dense(), values.T if turned else values)


def test_gate_and_up_of_different_types_are_held_as_values(file: Path, tmp_path: Path) -> None:
    metadata, tensors = read_file(file)
    types = {name: type_of(name) for name in tensors}
    types["blk.0.ffn_up_exps.weight"] = "q6_k"
    for name, type in types.items():
        if type != "f32":
            *rows, cols = tensors[name].shape
            blocks = random_blocks(type, int(np.prod(rows)), cols)
            tensors[name] = blocks.numpy().reshape(*rows, -1)
    skeleton = build_skeleton(write_file(tmp_path / "mixed.gguf", metadata, tensors, types))
    first, second, _ = (block.layout.specs for block in skeleton.blocks)
    assert [first[name].stored is None for name in ("gate_up_proj", "down_proj")] == [True, False]
    assert all(spec.stored is not None for spec in second.values())
