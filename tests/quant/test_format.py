"""Formats: bytes, views of slots, encoding, and computation."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at_level, largest_integer
from tiny_served import parts_of, tiny

from moefit.errors import CheckpointError, ConfigError
from moefit.moe.families import TensorSpec
from moefit.moe.layouts import find_blocks
from moefit.quant.cpu_kernels import kernels
from moefit.quant.encode import encode
from moefit.quant.format import (
    FORMATS,
    NATIVE,
    GroupedFormat,
    expert_output,
    matrix_shape,
    parse_format,
    weights_in,
)
from moefit.quant.grouped_int import PLANES, GroupedMatrix, codes_bytes, meta_bytes
from moefit.quant.library import LEVELS
from moefit.serve.cache.slot import Slot, allocate_slot

torch.set_num_threads(1)
CPU = torch.device("cpu")
GROUPED = [name for name, format in FORMATS.items() if format.is_encoded]
specs = st.dictionaries(
    st.text("abc_", min_size=1),
    st.builds(
        TensorSpec,
        st.lists(st.integers(1, 140), min_size=1, max_size=2).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def leaves(slot: Slot) -> list[torch.Tensor]:
    return [
        leaf
        for weight in slot.tensors.values()
        for leaf in (
            (weight,) if isinstance(weight, torch.Tensor) else (weight.codes_RB, weight.meta_RMG)
        )
    ]


def random_tensors(specs) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        short: torch.randn(spec.shape, generator=generator).to(spec.dtype)
        for short, spec in specs.items()
    }


@settings(deadline=None, max_examples=60)
@given(specs, st.sampled_from(sorted(FORMATS)))
def test_slot_bytes_equal_sum_of_parts(specs, name: str) -> None:
    """Slots have whole pages, and parts are on cache lines without overlap."""
    format = FORMATS[name]
    slot = allocate_slot(format, specs, CPU)
    assert slot.nbytes == format.nbytes(specs) == slot.buffer_B.nbytes
    parts = sorted((leaf.data_ptr(), leaf.nbytes) for leaf in leaves(slot))
    assert all(start % 64 == 0 for start, _ in parts)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(parts))
    assert parts[-1][0] + parts[-1][1] <= slot.buffer_B.data_ptr() + slot.nbytes
    wasted = slot.nbytes - sum(size for _, size in parts)
    assert 0 <= wasted < 64 * len(parts) + 4096


@settings(deadline=None, max_examples=60)
@given(specs, st.sampled_from(GROUPED))
def test_written_bytes_equal_encoder_output(specs, name: str) -> None:
    format = FORMATS[name]
    assert isinstance(format, GroupedFormat)
    slot, native = allocate_slot(format, specs, CPU), random_tensors(specs)
    format.encode(slot.tensors, native, specs)
    read = format.decode(slot.tensors, specs, torch.float32)
    for short, spec in specs.items():
        if len(spec.shape) == 1:
            assert torch.equal(read[short], native[short]), "vectors stay as they are"
            continue
        weight_RC = native[short].T if spec.inputs_first else native[short]
        made = encode(weight_RC, format.bits, format.encoder).dense()
        assert torch.equal(read[short], made.T if spec.inputs_first else made)


@pytest.mark.parametrize("name", GROUPED)
def test_bytes_by_hand(name: str) -> None:
    bits = int(name[3])
    specs = {
        "w_in": TensorSpec((1408, 640), torch.bfloat16),
        "w_out": TensorSpec((704, 640), torch.bfloat16, inputs_first=True),
        "bias": TensorSpec((640,), torch.bfloat16),
    }
    groups = 1408 * 10 + 640 * 11
    exact = groups * (bits * 8 + (2 if bits == 8 else 4)) + 1280
    assert -(-exact // 4096) * 4096 == FORMATS[name].nbytes(specs)
    assert matrix_shape(specs["w_out"]) == (640, 704)
    assert weights_in(specs) == 64 * groups
    assert codes_bytes(640, 704, bits) + meta_bytes(640, 704, bits) == 640 * 11 * (
        bits * 8 + (2 if bits == 8 else 4)
    )


def test_fewer_bits_take_fewer_bytes() -> None:
    (block, *_) = find_blocks(tiny("Mixtral", hidden_size=512, intermediate_size=512))
    sizes = [FORMATS[f"int{bits}"].nbytes(block.layout.specs) for bits in PLANES]
    sizes.append(NATIVE.nbytes(block.layout.specs))
    assert sizes == sorted(set(sizes))


# A block's experts


@pytest.fixture(params=["Mixtral", "GptOss", "DeepseekV3"])
def block_and_module(request):
    sizes = {"hidden_size": 80, "intermediate_size": 72, "head_dim": 8}
    model = tiny(request.param, **sizes)
    block = find_blocks(model)[0]
    return block, model.get_submodule(block.name)


@pytest.mark.parametrize("kernel_level", [*(at_level(one) for one in LEVELS), "torch"])
@pytest.mark.parametrize("name", ["int8", "int4", "int3-nearest"])
def test_output_equals_family_with_decoded_tensors(
    block_and_module, name: str, kernel_level: str, monkeypatch
) -> None:
    """Includes transposed matrices and biases (GptOss)."""
    monkeypatch.setattr("moefit.quant.backend.kernels", lambda: kernels(kernel_level))
    block, module = block_and_module
    format, specs = FORMATS[name], block.layout.specs
    slot, native = allocate_slot(format, specs, CPU), parts_of(module, block, 3)
    with torch.inference_mode():
        format.encode(slot.tensors, native, specs)
        decoded = {}
        for short, tensor in native.items():
            weight = slot.tensors[short]
            if isinstance(weight, GroupedMatrix):
                dense_RC = weight.dense()
                decoded[short] = dense_RC.T if specs[short].inputs_first else dense_RC
                assert decoded[short].shape == tensor.shape
                assert (decoded[short] - tensor).norm() < 0.2 * tensor.norm()
            else:
                assert torch.equal(weight, tensor)
                decoded[short] = tensor
        x_RD = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
        y_RD = expert_output(block.layout, format, slot.tensors, x_RD)
        expected_RD = block.layout.output(decoded, x_RD)
        # Kernels round activations.
        rounding = 0 if kernel_level == "torch" else 3 / largest_integer(int(name[3]))
        slack = rounding * expected_RD.abs().max()
        assert bool(((y_RD - expected_RD).abs() <= slack).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
def test_padding_rows_do_not_change_output(family: str, dtype: torch.dtype, monkeypatch) -> None:
    model = tiny(family, dtype=dtype, hidden_size=80, intermediate_size=72, head_dim=8)
    block = find_blocks(model)[0]
    native = parts_of(model.get_submodule(block.name), block, 3)
    x_RD = torch.randn(13, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in (1, 7, 8, 9, 13):
        with torch.inference_mode():
            monkeypatch.setattr("moefit.quant.format.round_rows", lambda rows: rows)
            wanted_RD = expert_output(block.layout, NATIVE, native, x_RD[:rows])
            monkeypatch.undo()
            made_RD = expert_output(block.layout, NATIVE, native, x_RD[:rows])
        assert made_RD.shape == wanted_RD.shape == (rows, 80)
        off = (made_RD.float() - wanted_RD.float()).abs().max()
        # Torch may sum another number of rows otherwise, and then it rounds otherwise.
        assert off <= 4 * torch.finfo(dtype).eps * wanted_RD.float().abs().max()


@pytest.mark.parametrize("name", ["int8", "int2"])
def test_unencodable_tensor_raises(block_and_module, name: str) -> None:
    block, module = block_and_module
    specs = block.layout.specs
    native = {k: v.detach().clone() for k, v in parts_of(module, block, 0).items()}
    short = next(one for one in specs if one.startswith("down_proj"))
    native[short][2, 3] = torch.inf
    place = "output 3 for input 2" if specs[short].inputs_first else "output 2 for input 3"
    format = FORMATS[name]
    with pytest.raises(CheckpointError, match=f"{short}: the weight of {place} is inf"):
        format.encode(allocate_slot(format, specs, CPU).tensors, native, specs)


def test_encoding_bytes_of_encoding_formats() -> None:
    specs = {"w": TensorSpec((64, 1000), torch.bfloat16), "b": TensorSpec((64,), torch.float32)}
    assert NATIVE.encoding_bytes(specs) == 0
    assert FORMATS["int4"].encoding_bytes(specs) > 64 * 1000 * 2 + 256


# Names


@pytest.mark.parametrize("name", FORMATS)
def test_format_by_name(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("int7", "int6"),
        ("int1", "int2"),
        ("int0", "int2"),
        ("q4_K_M", "int4"),
        ("fp8", "int8"),
        ("4", "int4"),
        ("int4-nearset", "int4"),
        ("INT4", "int4"),
        ("bf16", "native"),
        ("float32", "native"),
        ("nativ", "native"),
        ("", "int8"),
        ("auto", "int8"),
        ("int" + "4" * 9999, "native"),
    ],
)
def test_unknown_precision_suggests_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"there are native, int2, .*nearest: {nearest}$"):
        parse_format(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int5", "int2"])
def test_slots_on_an_accelerator(name: str) -> None:
    format, specs = FORMATS[name], {"w": TensorSpec((300, 100), torch.bfloat16)}
    native = random_tensors(specs)
    dense = []
    for device in (CPU, torch.device("cuda")):
        slot = allocate_slot(format, specs, device)
        format.encode(slot.tensors, native, specs)
        dense.append(format.decode(slot.tensors, specs, torch.bfloat16)["w"])
    assert dense[1].device.type == "cuda" and torch.equal(dense[0], dense[1].cpu())
