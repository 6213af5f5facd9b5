"""Values of quantised weights: bit-equal to the formula, and to transformers' where it has one."""

from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moefit.checkpoint.formats.declared import Declared
from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.checkpoint.formats.find import find_weights
from moefit.checkpoint.safetensors import SINGLE, Checkpoint
from moefit.errors import CheckpointError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def declaration(values: dict[str, Any]) -> Declared:
    return Declared(where="a test", method=values["quant_method"], values=values)


def found(
    folder: Path,
    stored: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stem: str = "layers.0.up_proj.",
) -> tuple[Checkpoint, EncodedTensor]:
    """Write the tensors of one weight and find it."""
    save_file({f"{stem}{part}": one.contiguous() for part, one in stored.items()}, folder / SINGLE)
    checkpoint = Checkpoint(folder)
    declared = None if config is None else declaration(config)
    (one,) = find_weights(checkpoint.spans, declared, dtype).values()
    assert isinstance(one, EncodedTensor)
    return checkpoint, one


def values(*arguments: Any, **more: Any) -> Tensor:
    checkpoint, one = found(*arguments, **more)
    one.check()
    assert one.nbytes == sum(span.nbytes for span in one.spans)
    return checkpoint.tensor(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", quantised.KINDS)
def test_values_equal_the_formula(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    store, config = quantised.KINDS[kind]
    for number, shape in enumerate([(48, 64), (136, 320)]):
        stored, expected = store(weight(*shape, seed=number))
        assert torch.equal(values(tmp_path, stored, config, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_equals_transformers(tmp_path: Path, dtype: torch.dtype, scales: torch.dtype) -> None:
    stored, _ = quantised.fp8_blocks(weight(256, 384), 128, scales)
    expected = Fp8Dequantize(None)._dequantize_one(
        stored["weight"], stored["weight_scale_inv"], output_dtype=dtype
    )
    assert torch.equal(values(tmp_path, stored, None, dtype), expected)


def test_fp8_with_exponents_as_scales_equals_transformers(tmp_path: Path) -> None:
    stored, _ = quantised.fp8_blocks(weight(64, 96), 32)
    exponents = stored["weight_scale_inv"].log2().round().add(127).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(stored["weight"], exponents)
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        stored["weight_scale_inv"] = scales
        assert torch.equal(values(tmp_path, stored, config), expected)


@pytest.mark.parametrize("config", [None, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_last_block_may_be_short(tmp_path: Path, config: Any) -> None:
    """As in DeepSeek-V3's kv_a_proj_with_mqa, 576 rows; transformers stretches or refuses these."""
    stored, expected = quantised.fp8_blocks(weight(144, 200), 128)
    assert stored["weight_scale_inv"].shape == (2, 2)
    assert torch.equal(values(tmp_path, stored, config), expected.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_equals_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    blocks = torch.randint(0, 256, (3, 70, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 70, 4), dtype=torch.uint8)
    scales[0, :2, 0] = torch.tensor([0, 254], dtype=torch.uint8)
    blocks[0, 1, 0] = 0x11  # 0.5, which is finite with the largest scale
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    stored = {"proj_blocks": blocks, "proj_scales": scales}
    checkpoint, one = found(tmp_path, stored, None, dtype, "experts.down_")
    one.check()
    assert one.shape == tuple(expected.shape) == (3, 128, 70)
    assert torch.equal(checkpoint.tensor(one), expected)
    for row in range(3):
        assert torch.equal(checkpoint.tensor(one.row(row)), expected[row])
        assert torch.equal(checkpoint.tensor(one.row(row).in_stack()), expected[row : row + 1])
        assert one.row(row).nbytes * 3 == one.nbytes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq_in_any_order_of_columns(tmp_path: Path, bits: int, offset: int) -> None:
    of = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    stored, expected = quantised.gptq(weight(32, 96), 32, bits, of, offset)
    config = {"quant_method": "gptq", "bits": bits, "desc_act": True}
    config["checkpoint_format"] = "gptq" if offset else "gptq_v2"
    assert torch.equal(values(tmp_path, stored, config, torch.float32), expected)


def test_gptq_without_g_idx_or_zeros(tmp_path: Path) -> None:
    stored, expected = quantised.gptq(weight(32, 96), 32)
    del stored["g_idx"]
    assert torch.equal(values(tmp_path, stored, None, torch.float32), expected)
    stored["qzeros"].fill_(0x77777777)  # 8 in the first format: half the range
    symmetric = values(tmp_path, stored, None, torch.float32)
    del stored["qzeros"]
    assert torch.equal(values(tmp_path, stored, None, torch.float32), symmetric)


def test_compressed_tensors_in_any_order_of_columns(tmp_path: Path) -> None:
    of = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    stored, expected = quantised.w4a16_asymmetric(weight(40, 96), of=of)
    assert torch.equal(values(tmp_path, stored, dtype=torch.float32), expected)
    stored["weight_g_idx"].fill_(-1)  # not used
    stored["weight_zero_point"].fill_(-0x77777778)  # 8 everywhere
    plain = dict(stored)
    del plain["weight_g_idx"], plain["weight_zero_point"]
    assert torch.equal(values(tmp_path, stored), values(tmp_path, plain))


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w4a16-asymmetric", "nvfp4", "fp8-channels"])
def test_compressed_tensors_equal_the_library(tmp_path: Path, kind: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    store, config = quantised.KINDS[kind]
    stored, _ = store(weight(48, 64))
    arguments = dict(config["config_groups"]["group_0"]["weights"])
    strategy = {"nvfp4": "tensor_group", "fp8-channels": "channel"}.get(kind, "group")
    arguments |= {"strategy": strategy, "group_size": arguments.get("group_size", 32)}
    if strategy == "channel":
        del arguments["group_size"]
    scheme = schemes.QuantizationScheme(
        targets=["Linear"], weights=schemes.QuantizationArgs(**arguments)
    )
    name = {"nvfp4": "nvfp4-pack-quantized", "fp8-channels": "float-quantized"}.get(kind)
    library = compressors.BaseCompressor.get_value_from_registry(name or "pack-quantized")
    expected = library.decompress(dict(stored), scheme)["weight"]
    assert torch.equal(values(tmp_path, stored, config), expected.bfloat16())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("kind", quantised.KINDS)
def test_scales_that_cannot_be_meant_raise(tmp_path: Path, kind: str, wrong: float) -> None:
    store, config = quantised.KINDS[kind]
    stored, _ = store(weight(48, 64))
    name = next(name for name in stored if name.startswith(("weight_scale", "scales")))
    scales = stored[name]
    if scales.dtype == torch.float8_e4m3fn and wrong == float("inf"):
        pytest.skip("this dtype has no infinity")
    scales.view(-1)[-1] = wrong
    checkpoint, one = found(tmp_path, stored, config)
    with pytest.raises(CheckpointError, match=r"up_proj.weight \(.*(not finite|scales of zero|is)"):
        checkpoint.tensor(one)


def test_scale_of_zero_for_zeros_is_accepted(tmp_path: Path) -> None:
    W = weight(48, 64)
    W[16:32, 32:48] = 0
    stored, _ = quantised.fp8_blocks(W + 0)
    stored["weight"][16:32, 32:48] = 0
    stored["weight_scale_inv"][1, 2] = 0
    assert bool((values(tmp_path, stored)[16:32, 32:48] == 0).all())


def test_mxfp4_scale_that_is_no_number_raises(tmp_path: Path) -> None:
    stored, _ = quantised.mxfp4(weight(32, 64))
    stored["scales"][3, 1] = 255
    parts = {f"proj_{name}": one[None] for name, one in stored.items()}
    checkpoint, one = found(tmp_path, parts, stem="experts.up_")
    with pytest.raises(CheckpointError, match=r"up_proj\[0\].*not finite"):
        checkpoint.tensor(one)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize("kind", ["gptq", "w4a16"])
def test_group_out_of_range_raises(tmp_path: Path, kind: str, wrong: int) -> None:
    of = torch.arange(96) // 32
    if kind == "gptq":
        stored, _ = quantised.gptq(weight(32, 96))
        stored["g_idx"][5] = wrong
    else:
        stored, _ = quantised.w4a16_asymmetric(weight(32, 96), of=of)
        stored["weight_g_idx"][5] = wrong
    checkpoint, one = found(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"g_idx has values from .* there are 3 groups"):
        checkpoint.tensor(one)


def changed(kind: str, part: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    stored, _ = quantised.KINDS[kind][0](weight(48, 64))
    return stored | {part: torch.ones(shape, dtype=stored[part].dtype)}


@pytest.mark.parametrize(
    ("kind", "part", "shape"),
    [
        ("fp8-blocks", "weight_scale_inv", (5, 4)),
        ("fp8-blocks", "weight_scale_inv", (7,)),
        ("w4a16", "weight_scale", (48, 7)),
        ("w4a16", "weight_scale", (47, 2)),
        ("w4a16-asymmetric", "weight_zero_point", (5, 2)),
        ("nvfp4", "weight_scale", (48, 3)),
        ("gptq", "qzeros", (2, 5)),
        ("gptq", "g_idx", (63,)),
        ("gptq", "scales", (2, 48, 1)),
        ("awq", "qzeros", (3, 6)),
    ],
)
def test_tensors_that_contradict_each_other_raise(
    tmp_path: Path, kind: str, part: str, shape: tuple[int, ...]
) -> None:
    _, one = found(tmp_path, changed(kind, part, shape))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        one.check()


def test_shape_that_is_not_the_tensors_raises(tmp_path: Path) -> None:
    stored, _ = quantised.w4a16(weight(48, 64))
    stored["weight_shape"] = torch.tensor([48, 63])
    checkpoint, one = found(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"weight_shape is \[48, 63\]"):
        checkpoint.tensor(one)


def test_stack_with_other_rows_raises(tmp_path: Path) -> None:
    stored = {
        "proj_blocks": torch.zeros(3, 8, 1, 16, dtype=torch.uint8),
        "proj_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
    }
    _, one = found(tmp_path, stored, stem="experts.up_")
    with pytest.raises(
        CheckpointError, match=r"3 matrices, but experts.up_proj_scales \[2, 8, 1\]"
    ):
        one.check()


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("nvfp4", "weight_global_scale", {}),
        ("gptq", "g_idx", {"desc_act": True}),
        ("gptq", "qzeros", {"sym": False}),
        ("awq", "qzeros", {"zero_point": True}),
    ],
)
def test_tensors_that_are_declared_must_exist(
    tmp_path: Path, kind: str, part: str, said: dict[str, Any]
) -> None:
    store, config = quantised.KINDS[kind]
    stored, _ = store(weight(48, 64))
    del stored[part]
    with pytest.raises(CheckpointError, match=r"up_proj.weight .* lacks the .* its format has"):
        found(tmp_path, stored, config | said)


def test_tensors_that_other_experts_have_must_exist(tmp_path: Path) -> None:
    store, config = quantised.KINDS["w4a16-asymmetric"]
    tensors = {
        f"mlp.experts.{expert}.up_proj.{part}": one.contiguous()
        for expert in range(3)
        for part, one in store(weight(48, 64, seed=expert))[0].items()
    }
    del tensors["mlp.experts.1.up_proj.weight_zero_point"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"experts.1.* lacks the zero points .*experts.[02]"):
        find_weights(Checkpoint(tmp_path).spans, declaration(config), torch.bfloat16)


def test_codes_that_are_no_numbers_raise(tmp_path: Path) -> None:
    stored, _ = quantised.fp8_tensor(weight(48, 64))
    stored["weight"].view(torch.uint8)[1, 5] = 255
    checkpoint, one = found(tmp_path, stored)
    with pytest.raises(CheckpointError, match=r"up_proj.weight .*not numbers"):
        checkpoint.tensor(one)
    with pytest.raises(CheckpointError, match=r"up_proj.weight .*not numbers"):
        one.read_codes(checkpoint.reader)
