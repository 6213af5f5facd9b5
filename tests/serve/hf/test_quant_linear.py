"""Dense weights in grouped integers."""

import copy

import pytest
import torch
from tiny_families import tiny_family, token_ids
from tiny_served import VOCABULARY, saved, tiny

import moefit
from moefit.errors import BudgetTooSmallError
from moefit.moe.layouts import find_blocks
from moefit.quant import encoded_weight
from moefit.quant.encode import encode
from moefit.quant.format import parse_format
from moefit.serve.hf import quant_linear
from moefit.serve.hf.dense_groups import DenseGroups
from moefit.serve.hf.quant_linear import (
    EncodedLinear,
    GroupedEmbedding,
    decoded_bytes,
    quantize_dense_weights,
)

SIZES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 199}
FAMILIES = ("Mixtral", "Olmoe", "GptOss", "DeepseekV3")


def dequantized(model, bits: int):
    """Return the model with linear layers and embeddings encoded and decoded."""
    routers = ("gate", "router")
    for name, module in model.named_modules():
        if type(module) not in (torch.nn.Linear, torch.nn.Embedding):
            continue
        if name.endswith(routers) or module.weight.numel() < 4096:
            continue
        with torch.no_grad():
            module.weight.copy_(encode(module.weight.detach().clone(), bits).dense())
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_with_the_decoded_weights(family: str, tied: bool, tmp_path) -> None:
    model = tiny(family, **SIZES, tie_word_embeddings=tied)
    folder = saved(model, tmp_path)
    ids = torch.randint(1, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    with moefit.load(folder, dense_precision="int8") as served, torch.inference_mode():
        kinds = {type(module) for module in served.model.modules()}
        assert {EncodedLinear, GroupedEmbedding} <= kinds
        prompt = served.model(ids).logits
        one = served.model(ids[:1, :1]).logits
        expected = dequantized(model, 8)
        scale = float(expected(ids).logits.abs().max())
        torch.testing.assert_close(prompt, expected(ids).logits, rtol=0, atol=2e-3 * scale)
        torch.testing.assert_close(one, expected(ids[:1, :1]).logits, rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize("family", ["jamba", "deepseek_v32", "hy_v4", "llama4"])
def test_families_that_read_a_weight_themselves(family: str, monkeypatch) -> None:
    """Jamba multiplies by one, the others ask for its dtype or device."""
    monkeypatch.setattr(quant_linear, "_MIN_WEIGHTS", 1)
    model = tiny_family(family).bfloat16()
    ids = token_ids(1, 7)
    wanted = model(ids).logits
    form = parse_format("int8").dense_format
    assert form is not None
    quantize_dense_weights(model, form, find_blocks(model))
    assert {EncodedLinear, GroupedEmbedding} <= {type(one) for one in model.modules()}
    assert model(ids).logits.shape == wanted.shape


@pytest.mark.parametrize("of", ["linear", "embedding"])
def test_weight_is_the_decoded_matrix_and_decoded_only_if_used(of: str, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = encode(torch.randn(50, 100, generator=generator), 4)
    linear = EncodedLinear(matrix, None, torch.bfloat16)
    layer = linear if of == "linear" else GroupedEmbedding(matrix, None, torch.bfloat16)
    x_TI = torch.randn(3, 100, generator=generator).bfloat16()
    wanted_RC = matrix.dense(torch.bfloat16)
    assert torch.equal(layer.weight @ x_TI.T, wanted_RC @ x_TI.T)
    assert torch.equal(torch.nn.functional.linear(x_TI, layer.weight.float().bfloat16()),
                       x_TI @ wanted_RC.T)  # fmt: skip
    monkeypatch.setattr(encoded_weight, "decoded", lambda *_: pytest.fail("decoded"))
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (50, 100), "cpu")
    assert not dict(layer.named_parameters())


def test_estimate_matches_bytes_of_dense_weights(tmp_path) -> None:
    folder = saved(tiny("Mixtral", dtype=torch.bfloat16, **SIZES), tmp_path)
    with (
        pytest.warns(DeprecationWarning, match="dense_precision"),
        moefit.load(folder, rest="int4") as served,
    ):
        held = {id(t): t.nbytes for t in (*served.model.parameters(), *served.model.buffers())}
        assert sum(held.values()) == pytest.approx(served.budget.weights, rel=0.02)
        with moefit.load(folder) as native:
            assert served.budget.weights < 0.5 * native.budget.weights


@pytest.mark.parametrize("rows_at_once", [1, 7, 64, 198, 199, 500])
def test_large_matrix_is_decoded_in_parts_without_kernels(rows_at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(quant_linear, "backend", lambda device: None)
    generator = torch.Generator().manual_seed(0)
    matrix = encode(torch.randn(199, 100, generator=generator), 4)
    layer = EncodedLinear(matrix, torch.randn(199, generator=generator), torch.float32)
    x_BTI = torch.randn(2, 20, 100, generator=generator)
    whole_BTO = layer(x_BTI)
    monkeypatch.setattr(quant_linear, "_MAX_DECODED_BYTES", rows_at_once * 100 * 4)
    seen = []
    monkeypatch.setattr(
        quant_linear, "decoded", lambda part, dtype: seen.append(part.rows) or part.dense(dtype)
    )
    torch.testing.assert_close(layer(x_BTI), whole_BTO)
    slabs = max(1, rows_at_once // 16)
    assert max(seen) == min(16 * slabs, 199)
    assert sum(seen) == 199


def test_a_layer_that_has_computed_can_be_copied() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = EncodedLinear(encode(torch.randn(50, 100, generator=generator), 4), None, torch.float32)
    x_TI = torch.randn(3, 100, generator=generator)
    wanted_TO = layer(x_TI)
    other = copy.deepcopy(layer)
    layer.get_buffer("codes_RB").zero_()
    assert torch.equal(other(x_TI), wanted_TO)


def test_decoded_bytes_are_bounded(monkeypatch) -> None:
    model = tiny("Mixtral", **SIZES)
    whole = max(m.weight.numel() for m in quant_linear.quantizable_modules(model, ()).values()
                if isinstance(m, torch.nn.Linear))  # fmt: skip
    assert decoded_bytes(model, (), 4) == 4 * whole
    monkeypatch.setattr(quant_linear, "_MAX_DECODED_BYTES", 5000)
    assert decoded_bytes(model, (), 4) <= 5000


def test_generates(tmp_path) -> None:
    folder = saved(tiny("Olmoe", dtype=torch.bfloat16, **SIZES), tmp_path)
    with moefit.load(folder, dense_precision="int8", precision="int8") as served:
        made = served.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
        assert made.shape == (1, 8)


def test_native_weights_must_fit_while_they_are_encoded(tmp_path, monkeypatch) -> None:
    folder = saved(tiny("Mixtral", dtype=torch.bfloat16, **SIZES), tmp_path)
    monkeypatch.setattr(
        "moefit.serve.memory.estimate.dense_groups", lambda *_: DenseGroups((), 8 << 30)
    )
    with pytest.raises(BudgetTooSmallError, match="of dense weights while they are being encoded"):
        moefit.load(folder, dense_precision="int4", memory="6GiB")
