"""The Triton kernels compared with torch, on a GPU or in Triton's interpreter.

The bounds are those of `test_cpu_kernels.py`. Where more than one token is multiplied in
16 bits, weights of fewer than 8 bits are rounded to the tokens' dtype first, and that is added.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k_quants import k_matrix
from scaled_codes import CASES, matrix_of, scaled
from torch import Tensor

from moefit.checkpoint.gguf.blocks import K_QUANTS
from moefit.moe.layouts import ACTIVATIONS
from moefit.quant.cpu_kernels import KernelMatrix, KernelMlp, Weight
from moefit.quant.grouped_int import GroupedMatrix
from tests.quant.test_cpu_kernels import (
    KINDS,
    NATIVE,
    PLANES,
    dense,
    error_bound,
    normal,
    weight_of,
)

pytest.importorskip("triton", reason="Triton is not installed (its wheel has 290 MB)")

from moefit.quant.gpu.gpu_kernels import TritonKernels

RUN = TritonKernels()
DTYPES = tuple(NATIVE.values())
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
widths = pytest.mark.parametrize("bits", PLANES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(weight: Weight) -> Weight:
    """The device of the kernels."""
    if isinstance(weight, Tensor):
        return weight.to(HERE)
    codes_RB, meta_RMG = weight.codes_RB.to(HERE), weight.meta_RMG.to(HERE)
    return replace(weight, codes_RB=codes_RB, meta_RMG=meta_RMG)


def linear(x_TI: Tensor, weight: Weight) -> Tensor:
    return RUN.linear(x_TI.to(HERE), placed(weight)).cpu()


def bound(weight: Weight, x_TI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the error bound of a product [T, O]."""
    off_TO = error_bound(weight, x_TI, "triton")
    if isinstance(weight, Tensor) or weight.bits == 8 or len(x_TI) == 1:
        return off_TO
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    rounding_OI = dense(weight).abs() * HALF_STEP[dtype] + smallest
    return off_TO + x_TI.abs().double() @ rounding_OI.T


def assert_product(x_TI: Tensor, weight: Weight) -> None:
    y_TO = linear(x_TI, weight)
    assert y_TO.dtype == torch.float32 and y_TO.shape == (len(x_TI), len(dense(weight)))
    error_TO = (y_TO.double() - x_TI.double() @ dense(weight).T).abs()
    assert (error_TO <= bound(weight, x_TI.float(), x_TI.dtype)).all()


# One product


@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_dense_matrix(kind) -> None:
    shapes = (
        ((1, 1), 1),
        ((3, 63), 2),
        ((17, 64), 1),
        ((33, 65), 17),
        ((18, 330), 1),
        ((66, 70), 65),
    )
    for number, ((rows, cols), tokens) in enumerate(shapes):
        x_TI = normal(tokens, cols, seed=number).to(DTYPES[number % 3])
        assert_product(x_TI, weight_of(kind, rows, cols))


@pytest.mark.parametrize("name", [*CASES, "fp8", *K_QUANTS])
def test_codes_of_checkpoints_are_multiplied_as_their_values(name: str) -> None:
    """Values are decoded exactly, and are rounded to the tokens' dtype if there are several."""
    matrix = (
        matrix_of(17, 160)
        if name == "fp8"
        else k_matrix(name, 17, 512)
        if name in K_QUANTS
        else scaled(name, 17, 128)
    )
    weight_OI, dtype = matrix.dense().double(), DTYPES[len(name) % 3]
    assert torch.equal(RUN.decode(placed(matrix), torch.float32).cpu().double(), weight_OI)
    for tokens in (1, 3):
        x_TI = normal(tokens, matrix.cols).to(dtype)
        size_TO = x_TI.abs().double() @ weight_OI.abs().T
        step = 2.0**-18 if tokens == 1 else HALF_STEP[dtype] + 2.0**-18
        error_TO = (linear(x_TI, matrix).double() - x_TI.double() @ weight_OI.T).abs()
        assert (error_TO <= size_TO * step).all()


def test_codes_of_checkpoints_and_other_formats_are_mixed() -> None:
    x_TD = normal(3, 96)
    mlps = [
        KernelMlp(w_in=placed(w_in), w_out=placed(w_out), activation="silu", gated=True)
        for w_in, w_out in (
            (scaled("mxfp4", 128, 96), scaled("mxfp4", 96, 64)),
            (weight_of(4, 128, 96), weight_of(3, 96, 64)),
        )
    ]
    tokens = [(0, 2), (1, 2)]
    apart = [
        RUN.experts(x_TD.to(HERE), [mlp], [some]) for mlp, some in zip(mlps, tokens, strict=True)
    ]
    assert torch.equal(RUN.experts(x_TD.to(HERE), mlps, tokens), torch.cat(apart))


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(kind, rows, cols, tokens, dtype, seed: int) -> None:
    assert_product(
        normal(tokens, cols, seed=seed).to(dtype), weight_of(kind, rows, cols, seed=seed)
    )


@widths
@dtypes
def test_empty_weights_give_empty_results(bits: int, dtype: torch.dtype) -> None:
    matrix = GroupedMatrix.empty(20, 100, bits)
    matrix.codes_RB.fill_(128 if bits == 8 else 0)
    matrix.meta_RMG.zero_()
    for tokens in (1, 3):
        assert not linear(normal(tokens, 100).to(dtype), matrix).any()


def test_no_tokens_give_empty_results() -> None:
    assert linear(normal(0, 70), weight_of(4, 8, 70)).shape == (0, 8)


def test_other_dtypes_and_strides_are_read() -> None:
    weight = placed(weight_of(4, 20, 100))
    x_TI = normal(3, 200).to(HERE)[:, ::2]
    assert torch.equal(
        RUN.linear(x_TI, weight), RUN.linear(x_TI.contiguous(), KernelMatrix(weight))
    )
    assert torch.equal(RUN.linear(x_TI, weight), RUN.linear(x_TI.double(), weight))


def test_unsupported_widths_are_not_read() -> None:
    with pytest.raises(AssertionError):
        linear(normal(2, 65), weight_of(4, 8, 64))


@pytest.mark.parametrize("kind", [4, 8, "float32"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf
def test_nan_affects_only_its_token(kind, tokens: int) -> None:
    x_TI = normal(tokens, 150)
    x_TI[tokens // 2, 149] = torch.nan
    fine_T = linear(x_TI, weight_of(kind, 40, 150)).isfinite().all(-1)
    assert fine_T.tolist() == [t != tokens // 2 for t in range(tokens)]


# Decoding


@widths
def test_decoding_equals_torch_bitwise(bits: int) -> None:
    for rows, cols in ((1, 1), (3, 65), (35, 330)):
        weight = placed(weight_of(bits, rows, cols))
        assert isinstance(weight, GroupedMatrix)
        for dtype in (*DTYPES, torch.float64):
            decoded = RUN.decode(weight, dtype)
            assert decoded.dtype == dtype and torch.equal(decoded, weight.dense(dtype))


# Experts


def make_mlp(
    kind_in, kind_out, *, width=72, inner=40, activation="silu", gated=True, seed=0
) -> KernelMlp:
    w_in = weight_of(kind_in, inner * (1 + gated), width, seed=seed)
    w_out = weight_of(kind_out, width, inner, seed=seed + 1)
    return KernelMlp(w_in=placed(w_in), w_out=placed(w_out), activation=activation, gated=gated)


def twin(x_RD: Tensor, mlp: KernelMlp) -> Tensor:
    """Reference in float64 over decoded weights, with torch's rounding of hidden units."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(x_RD.dtype).double()

    h_RF = rounded(x_RD.double() @ dense(mlp.w_in).cpu().T)
    gate_RF, up_RF = h_RF.chunk(2, -1) if mlp.gated else (h_RF, torch.ones(()))
    h_RF = rounded(rounded(ACTIVATIONS[mlp.activation](gate_RF)) * up_RF)
    return h_RF @ dense(mlp.w_out).cpu().T


CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest output


def assert_experts(x_TD: Tensor, mlps: list[KernelMlp], tokens) -> None:
    y_RD = RUN.experts(x_TD.to(HERE), mlps, tokens).cpu()
    wanted_RD = torch.cat([twin(x_TD[mine], mlp) for mlp, mine in zip(mlps, tokens, strict=True)])
    assert y_RD.dtype == torch.float32
    assert y_RD.shape == wanted_RD.shape
    if len(y_RD):
        error_R = (y_RD.double() - wanted_RD).abs().amax(-1)
        assert (error_R <= CLOSE[x_TD.dtype] * wanted_RD.abs().amax(-1).clamp_min(0.1)).all()


ROUTED = [
    [[0]],
    [[0, 1, 2, 3, 4]],
    [[2, 2]],  # one token that chose the same expert twice
    [[], [0], [], [4], [3], []],  # without rows: first, between and last
    [[3, 0], [], [2, 0, 1, 4, 3] * 4, [1]],  # more than a tile
]


@dtypes
@pytest.mark.parametrize("tokens", ROUTED)
def test_experts_of_mixed_formats_in_two_launches(tokens, dtype: torch.dtype) -> None:
    native = next(name for name, one in NATIVE.items() if one == dtype)
    kinds = [4, native, 8, 2, 5, 3, 6]
    mlps = [make_mlp(kinds[e], kinds[-1 - e], seed=e) for e in range(len(tokens))]
    assert_experts(normal(5, 72).to(dtype), mlps, tokens)


@pytest.mark.parametrize("kind", ["bfloat16", *PLANES])
def test_all_formats_together(kind) -> None:
    mlps = [make_mlp(kind, 4), make_mlp(8, kind, seed=3)]
    for count in (1, 2):
        assert_experts(normal(count, 72).bfloat16(), mlps, [[*range(count)], [0]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, of exp
def test_activations_equal_torch(activation: str, gated: bool) -> None:
    x_TD = normal(5, 72) * torch.tensor([0.01, 0.3, 1.0, 10.0, 300.0])[:, None]
    mlp = make_mlp("float32", 8, activation=activation, gated=gated)
    assert_experts(x_TD, [mlp], [[0, 1, 2, 3, 4]])


@settings(deadline=None, max_examples=10)
@given(
    kinds=st.lists(st.tuples(*[st.sampled_from([*PLANES])] * 2), min_size=1, max_size=3),
    width=st.integers(1, 150),
    inner=st.integers(1, 140),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_experts_of_any_shape(kinds, width: int, inner: int, gated: bool, dtype, data) -> None:
    mlps = [
        make_mlp(*pair, width=width, inner=inner, gated=gated, activation="relu", seed=n)
        for n, pair in enumerate(kinds)
    ]
    rows = st.lists(st.integers(0, 3), max_size=data.draw(st.sampled_from([1, 7])))
    assert_experts(normal(4, width).to(dtype), mlps, [data.draw(rows) for _ in mlps])


def test_tokens_may_be_tensors() -> None:
    mlps, x_TD = [make_mlp(4, 4), make_mlp(3, 8, seed=1)], normal(5, 72).to(HERE)
    tokens = [[1, 4], [0]]
    made_RD = RUN.experts(x_TD, mlps, [torch.tensor(mine).to(HERE) for mine in tokens])
    assert torch.equal(made_RD, RUN.experts(x_TD, mlps, tokens))


def test_no_routed_tokens_give_zero() -> None:
    assert RUN.experts(normal(3, 72).to(HERE), [], []).shape == (0, 72)
    assert RUN.experts(normal(3, 72).to(HERE), [make_mlp(4, 4)] * 2, [[], []]).shape == (0, 72)


def test_row_result_does_not_depend_on_batch() -> None:
    """Results must not depend on which experts were resident."""
    mlps, x_TD = [make_mlp(4, 4), make_mlp(3, 8, seed=1)], normal(5, 72)
    for count in (1, 5):
        tokens = [[0], [*range(count)]]
        together_RD = RUN.experts(x_TD[:count].to(HERE), mlps, tokens)
        for one in (0, 1):
            alone_RD = RUN.experts(x_TD[:count].to(HERE), [mlps[one]], [tokens[one]])
            assert torch.equal(alone_RD, together_RD[one : one + len(alone_RD)])


# What the interpreter does not see: whether it compiles for a GPU

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moefit.quant.gpu import triton_kernels as kernels

TABLE = dict(tiles="*i64", KIND=kernels.MIXED.value)
LINEAR = dict(codes="*u8", meta="*fp16", rows="i32", cols="i32")
CASES = {
    "linear_kernel": dict(LINEAR, x="*bf16", y="*fp32", tokens="i32", KIND=3),
    "hidden_kernel": dict(TABLE, x="*bf16", token_R="*i64", h="*bf16", inner="i32", cols="i32",
                          ACTIVATION="gelu", GATED=True),
    "down_kernel": dict(TABLE, h="*bf16", y="*fp32", rows="i32", cols="i32"),
    "decode_kernel": dict(LINEAR, out="*bf16", KIND=5),
}
for name, case in CASES.items():
    for capability, tokens, rows in ((80, 1, 16), (80, 16, 32), (90, 64, 64)):
        if tokens == 1 or name != "decode_kernel":
            case |= dict(TOKENS=tokens, ROWS=rows, GROUPS=4)
            kernel = getattr(kernels, name)
            types = {n: case[n] if n.islower() or n == "token_R" else "constexpr"
                     for n in kernel.arg_names}
            known = {n: case[n] for n, kind in types.items() if kind == "constexpr"}
            made = triton.compile(
                ASTSource(kernel, types, known), target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": True},
            )
            tensor_cores = "mma" in made.asm["ptx"]
            assert tensor_cores == (tokens > 1), (name, tokens)
            print(name, capability, tokens, len(made.asm["cubin"]))
"""


@pytest.mark.slow
def test_kernels_compile_and_use_tensor_cores(tmp_path: Path) -> None:
    script = tmp_path / "compile_for_gpus.py"  # Triton reads kernels' sources from files
    script.write_text(COMPILE)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, str(script)], check=True, env=environment)
