"""Slots that hold a quantised checkpoint's own codes: values, whole models, budgets, damage.

Models compute in bfloat16. How far one may be from the same model in float32 is what transformers'
own output in bfloat16 is, with the same dequantised weights.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import quantised
import torch
from tiny_served import logits, saved, settled, tiny, tokens, with_slots
from torch import Tensor

import moefit
from moefit.errors import CheckpointError
from moefit.moe.families import MoeBlock, ScaledCodes
from moefit.quant.format import DECODED, NATIVE
from moefit.quant.scaled.fp8 import Fp8Matrix
from moefit.quant.scaled.matrix import ScaledMatrix
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import _as_stored, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed.store import open_packed
from moefit.serve.precision.allocate import ladders_of
from tests.serve.test_quantised_serving import of_transformers, written

# Bits a weight in a slot, and the largest distance to the values in bfloat16 that transformers
# computes: integers with scales in float16 are multiplied in float16 there, and then rounded again.
KINDS = {
    "mxfp4": (4.25, 0.0),
    "w4a16": (4.5, 0.0),
    "w4a16-asymmetric": (4.75, 0.0),
    "int8-channels": (8.25, 0.0),
    "gptq": (4.75, 2.0**-7),
    "awq": (4.75, 2.0**-7),
    "fp8-tensor": (None, 0.0),  # 32 bits of 128 inputs or fewer
    "fp8-channels": (None, 0.0),
}
BF16 = torch.bfloat16


def made(folder: Path, kind: str, dtype: torch.dtype = BF16) -> tuple[Path, Path]:
    """Return folders of a plain and a quantised model; GPTQ's groups are in order."""
    if kind == "gptq":
        quantised.KINDS["gptq"][1]["desc_act"] = False
    try:
        return written(folder, kind, dtype)
    finally:
        quantised.KINDS["gptq"][1].pop("desc_act", None)


def store_of(folder: Path) -> tuple[ExpertStore, MoeBlock]:
    skeleton = build_skeleton(folder)
    block = skeleton.blocks[0]
    return ExpertStore(skeleton.checkpoint, skeleton.map.experts, {block.name: block}), block


def held(store: ExpertStore, block: MoeBlock, expert: int) -> Slot:
    slot = allocate_slot(NATIVE, block.layout.specs, torch.device("cpu"))
    store.read(block.name, expert, slot)
    return slot


@pytest.mark.parametrize("kind", KINDS)
def test_slots_hold_the_codes_and_decode_to_the_values(tmp_path: Path, kind: str) -> None:
    store, block = store_of(made(tmp_path, kind)[1])
    bits, distance = KINDS[kind]
    specs = block.layout.specs
    for expert in range(2):
        slot, values = held(store, block, expert), store.native(block.name, expert)
        decoded = NATIVE.decode(slot.tensors, specs, BF16)
        for short, value in values.items():
            matrix = slot.tensors[short]
            assert isinstance(matrix, ScaledMatrix | Fp8Matrix) == (value.dim() == 2)
            assert ((decoded[short] - value).abs() <= distance * value.abs()).all()
            if isinstance(matrix, ScaledMatrix):
                padded = matrix.rows * -(-matrix.cols // 64) * 64
                size = matrix.codes_RB.nbytes + matrix.meta_RMG.nbytes
                assert size * 8 == padded * bits
        assert slot.nbytes == NATIVE.nbytes(specs) <= DECODED.nbytes(specs)


def test_float32_models_and_other_formats_hold_values(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _, block = store_of(made(tmp_path / "a", "mxfp4", torch.float32)[1])
    assert all(spec.stored is None for spec in block.layout.specs.values())
    _, block = store_of(written(tmp_path, "nvfp4", BF16)[1])
    assert all(spec.stored is None for spec in block.layout.specs.values())


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).square().mean().sqrt())


@pytest.mark.parametrize("kind", ["mxfp4", "w4a16", "fp8-channels"])
@pytest.mark.usefixtures("computing")
def test_served_model_is_as_near_as_transformers(tmp_path: Path, kind: str) -> None:
    plain, folder = made(tmp_path, kind)
    ids = tokens(2, 9)
    exact = logits(of_transformers(plain).float(), ids).float()
    allowed = error(logits(of_transformers(plain), ids), exact)
    with moefit.load(folder, mode="exact", context=64) as served:
        least = with_slots(served, 1)
        for memory in (None, least):
            if memory is not None:
                served.set_memory(memory)
                settled(served)
            found = logits(served.model, ids)
            assert error(found, exact) <= 1.5 * allowed
            one = next(iter(served.blocks.values()))
            assert all(slot.format == NATIVE for slot in one.slots.values())
        assert served.report()["checkpoint"]["held"], "codes, by their names"
    with moefit.load(folder, mode="exact", context=64, precision="decoded") as served:
        assert error(logits(served.model, ids), exact) <= 1.5 * allowed
        one = next(iter(served.blocks.values()))
        assert one.block_slot_bytes == DECODED.nbytes(one.block.layout.specs)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_blocks_of_fp8_are_held(tmp_path: Path, scales: torch.dtype) -> None:
    """Of 128 x 128, of which the last ones are shorter, with gate above up in one matrix."""
    sizes = {"hidden_size": 192, "intermediate_size": 160, "head_dim": 8, "num_hidden_layers": 1}
    plain = saved(tiny("Mixtral", dtype=BF16, **sizes), tmp_path / "plain")
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    def store(matrix: Tensor) -> quantised.Stored:
        return quantised.fp8_blocks(matrix, 128, scales)

    store_, block = store_of(quantised.quantise(plain, tmp_path / "fp8", store, config))
    slot, values = held(store_, block, 2), store_.native(block.name, 2)
    decoded = NATIVE.decode(slot.tensors, block.layout.specs, BF16)
    assert all(isinstance(matrix, Fp8Matrix) for matrix in slot.tensors.values())
    assert all(torch.equal(decoded[short], value) for short, value in values.items())


def test_auto_begins_with_the_checkpoints_own_format(tmp_path: Path) -> None:
    """MXFP4 is smaller than int5 and exact: no larger format is ever chosen."""
    skeleton = build_skeleton(made(tmp_path, "mxfp4")[1])
    (block, *_), packed = skeleton.blocks, open_packed(skeleton, [])
    names = [choice.format for choice in ladders_of(block, packed)[0]]
    assert names[-1] == "native" and not {"int5", "int6", "int8"} & set(names)
    settings = LoadSettings(memory="8GiB", precision="auto", context=64)
    budget = memory_budget(skeleton, settings, packed)
    assert budget.format_totals[-1][0] == "native"
    assert budget.max_bytes == budget.all_resident_bytes_in()["native"]


def test_estimate_counts_codes(tmp_path: Path) -> None:
    skeleton = build_skeleton(made(tmp_path, "mxfp4")[1])
    specs = skeleton.blocks[0].layout.specs
    found = memory_budget(skeleton, LoadSettings(context=64))
    assert found.blocks[0].slot_bytes == NATIVE.nbytes(specs)
    decoded = memory_budget(skeleton, LoadSettings(context=64, precision="decoded"))
    assert decoded.blocks[0].slot_bytes == DECODED.nbytes(specs)
    assert skeleton.stored().held == ("mxfp4",)


def test_experts_of_different_formats_are_held_as_values(tmp_path: Path) -> None:
    plain = saved(tiny("Olmoe", dtype=BF16, hidden_size=64, intermediate_size=96), tmp_path / "p")
    calls = iter(range(1000))

    def store(matrix: Tensor) -> quantised.Stored:
        return (quantised.w4a16, quantised.int8_channels)[next(calls) % 2](matrix)

    _, block = store_of(quantised.quantise(plain, tmp_path / "mixed", store, quantised.CT))
    assert all(spec.stored is None for spec in block.layout.specs.values())


def test_matrices_with_input_units_in_rows_are_all_held_or_none(tmp_path: Path) -> None:
    """A product takes both as stored, with output units in rows, or both as the model has them."""
    block = build_skeleton(saved(tiny("GptOss"), tmp_path), BF16).blocks[0]
    turned = [short for short, spec in block.layout.specs.items() if len(spec.shape) == 2]
    codes = ScaledCodes("mxfp4", "e2m1", "e8m0", 32, transposed=True)
    rows = replace(codes, transposed=False)
    for held, expected in (
        (dict.fromkeys(turned, codes), codes),
        ({turned[0]: codes, turned[1]: None}, None),
        ({turned[0]: None, turned[1]: codes}, None),
        (dict.fromkeys(turned, rows), None),  # codes of the model's rows, which are inputs
    ):
        sources = cast(Any, [SimpleNamespace(held=held)] * block.num_experts)
        specs = _as_stored(block, sources).layout.specs
        assert [specs[short].stored for short in turned] == [expected] * 2


def test_slots_that_swaps_free_are_found_by_the_next(tmp_path: Path) -> None:
    folder = made(tmp_path, "mxfp4")[1]
    for precision in ("native", "decoded"):
        with moefit.load(folder, context=64, precision=precision) as served:
            for one in served.blocks.values():
                spares = one.shared.spares
                before = len(spares.get(one.spares_key, ()))
                one.swaps._return_spare()
                assert len(spares[one.spares_key]) == before + 1


def test_damaged_scales_are_an_error_of_one_expert(tmp_path: Path) -> None:
    _, folder = made(tmp_path, "mxfp4")
    tensors = quantised.load_file(folder / quantised.SINGLE)
    name = next(one for one in tensors if one.endswith("down_proj_scales"))
    tensors[name][3, 5, 1] = 255  # not a number
    quantised.save_file(tensors, folder / quantised.SINGLE, {"format": "pt"})
    store, block = store_of(folder)
    with pytest.raises(CheckpointError, match=r"down_proj\[3\] \(mxfp4\).*not finite"):
        held(store, block, 3)
    held(store, block, 2)


def test_scales_of_zero_are_for_zeros_only(tmp_path: Path) -> None:
    _, folder = made(tmp_path, "w4a16")
    file = folder / quantised.SINGLE
    tensors = quantised.load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.1.w2."
    tensors[f"{name}weight_scale"][4, 1] = 0
    quantised.save_file(tensors, file, {"format": "pt"})
    store, block = store_of(folder)
    with pytest.raises(CheckpointError, match="scales of zero"):
        held(store, block, 1)
    tensors[f"{name}weight_packed"][4, 4:8] = -0x77777778  # codes of 8, which stand for 0
    quantised.save_file(tensors, file, {"format": "pt"})
    store, block = store_of(folder)
    assert not NATIVE.decode(held(store, block, 1).tensors, block.layout.specs, BF16)["down_proj"][
        4, 32:64
    ].any()


def test_gptq_declared_in_order_must_be_so(tmp_path: Path) -> None:
    _, folder = made(tmp_path, "gptq")
    file = folder / quantised.SINGLE
    tensors = quantised.load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.g_idx"
    tensors[name] = tensors[name].flip(0)
    quantised.save_file(tensors, file, {"format": "pt"})
    store, block = store_of(folder)
    with pytest.raises(CheckpointError, match=r"g_idx is not in order.*decoded"):
        held(store, block, 1)
    assert store.native(block.name, 1)["down_proj"].isfinite().all()
