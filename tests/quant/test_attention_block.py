"""The attention block as one call of the kernels, compared with its reference in torch."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, at, compiled, largest_integer, levels, normal
from torch import Tensor

from moefit.moe.scoring import ScoringRule
from moefit.quant.attention import AttentionOptions
from moefit.quant.cpu_kernels import KernelMatrix, Weight, kernels
from moefit.quant.encode import encode
from moefit.quant.kv_int8 import Int8Rows, quantize_rows
from moefit.quant.layers.attention_block import (
    AttentionBlock,
    AttentionBlockKernel,
    CacheRows,
    Linear,
    Norm,
    plain_attention_block,
)
from moefit.quant.layers.layer_operations import NormForm, RotaryForm, RouterKernel, RoutingKernel

pytestmark = compiled
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and variants of a block; `norms` is the width of head norms in heads."""

    heads: int = 4
    groups: int = 2
    width: int = 32
    hidden: int = 72
    cosines: int = 32
    norms: str = "none"
    biases: bool = False
    bits: int | None = None
    rotary: RotaryForm = field(default_factory=RotaryForm)
    options: AttentionOptions = field(default_factory=AttentionOptions)

    def block(self, dtype: torch.dtype) -> AttentionBlock:
        queries, keys = self.heads * self.width, self.groups * self.width
        each = self.norms == "heads"
        head_norms = [
            None if self.norms == "none" else norm(self.width if each else size, dtype, seed=seed)
            for size, seed in ((queries, 5), (keys, 6))
        ]
        shapes = (queries, self.hidden), (keys, self.hidden), (keys, self.hidden)
        query, key, value, output = (
            self.linear(*shape, dtype, seed)
            for seed, shape in enumerate((*shapes, (self.hidden, queries)), start=10)
        )
        return AttentionBlock(
            before=norm(self.hidden, dtype, seed=3),
            after=norm(self.hidden, dtype, seed=4),
            query=query,
            key=key,
            value=value,
            output=output,
            of_queries=head_norms[0],
            of_keys=head_norms[1],
            heads=self.heads,
            groups=self.groups,
            rotary=self.rotary,
            options=self.options,
        )

    def linear(self, rows: int, cols: int, dtype: torch.dtype, seed: int) -> Linear:
        weight_OI = (normal(rows, cols, seed=seed) / cols**0.5).to(dtype)
        weight: Weight = weight_OI if self.bits is None else encode(weight_OI, self.bits)
        bias_O = normal(rows, seed=seed + 10) * 0.1 if self.biases else None
        return Linear(weight=KernelMatrix(weight), bias_O=bias_O)


def norm(width: int, dtype: torch.dtype, *, seed: int) -> Norm:
    weight_D = (1 + 0.2 * normal(width, seed=seed)).to(dtype)
    return Norm(form=NormForm(eps=1e-5), weight_D=weight_D, width=width)


@dataclass
class Step:
    """Inputs of a step; requests lie one after the other in the cache, with a gap between them."""

    x_TD: Tensor
    cos_TR: Tensor
    sin_TR: Tensor
    cache: CacheRows

    def copy(self, *, int8: bool = False) -> CacheRows:
        keys, values = self.cache.keys_GLC.clone(), self.cache.values_GLZ.clone()
        if int8:
            keys, values = quantize_rows(keys), quantize_rows(values)
        return replace(self.cache, keys_GLC=keys, values_GLZ=values)


def step(
    shape: Shape, sizes: list[tuple[int, int]], dtype: torch.dtype, window: int | None = None
) -> Step:
    tokens, places, requests = sum(new for _, new in sizes), 1, []
    for past, new in sizes:
        requests.append((places, past, new))
        places += past + new + 1
    angles_TR = normal(tokens, shape.cosines, seed=7)
    return Step(
        normal(tokens, shape.hidden).to(dtype),
        angles_TR.cos().to(dtype),
        angles_TR.sin().to(dtype),
        CacheRows(
            keys_GLC=normal(shape.groups, places, shape.width, seed=8).to(dtype),
            values_GLZ=normal(shape.groups, places, shape.width, seed=9).to(dtype),
            requests=requests,
            window=window,
        ),
    )


def close(one: Tensor, other: Tensor, shape: Shape) -> None:
    """Products with integers round activations, several times one after the other."""
    rounding = ROUNDING[one.dtype] + (3 / largest_integer(shape.bits) if shape.bits else 0)
    allowed = rounding * float(other.abs().max())
    torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=allowed)


VARIANTS = {
    "plain": Shape(),
    "one group, half rotated": Shape(groups=1, cosines=16),
    "norms of heads, biases": Shape(norms="heads", biases=True, hidden=70),
    "norms of all heads": Shape(norms="all", groups=4, width=16, cosines=16),
    "four bits": Shape(bits=4, hidden=128),
    "neighbours are pairs": Shape(
        rotary=RotaryForm(pairs_in=True, pairs_out=True, halves=False), cosines=16
    ),
    "sinks and a limit of scores": Shape(
        options=AttentionOptions(scale=0.3, softcap=5.0, sinks_H=normal(4, seed=30))
    ),
}


@levels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_block_is_that_of_the_reference(level, dtype) -> None:
    for shape in VARIANTS.values():
        given_step, block = (
            step(shape, [(0, 3), (7, 1), (4, 2)], dtype, window=5),
            shape.block(dtype),
        )
        assert block.supported(dtype, shape.cosines)
        kernel = AttentionBlockKernel(at(level), block, dtype, shape.cosines)
        mine, theirs = given_step.copy(), given_step.copy()
        inputs = given_step.x_TD, given_step.cos_TR, given_step.sin_TR
        made = kernel(*inputs, mine)
        sum_TD, normed_TD = plain_attention_block(block, *inputs, theirs)
        close(made.sum_TD, sum_TD, shape)
        close(made.normed_TD, normed_TD, shape)
        close(mine.keys_GLC, theirs.keys_GLC, shape)
        close(mine.values_GLZ, theirs.values_GLZ, shape)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 3)), min_size=1, max_size=4),
    variant=st.sampled_from(list(VARIANTS)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    int8=st.booleans(),
)
def test_requests_do_not_depend_on_each_other(sizes, variant, dtype, int8) -> None:
    shape = VARIANTS[variant]
    compiled_kernels = kernels()
    assert compiled_kernels is not None
    kernel = AttentionBlockKernel(compiled_kernels, shape.block(dtype), dtype, shape.cosines)
    all_of_it = step(shape, sizes, dtype)
    together = all_of_it.copy(int8=int8)
    made = kernel(all_of_it.x_TD, all_of_it.cos_TR, all_of_it.sin_TR, together)
    alone, row = all_of_it.copy(int8=int8), 0
    for request in together.requests:
        for token in range(request[2]):
            rows = slice(row, row + 1)
            one = replace(alone, requests=((request[0], request[1] + token, 1),))
            inputs = all_of_it.x_TD[rows], all_of_it.cos_TR[rows], all_of_it.sin_TR[rows]
            x_1D, cos_1R, sin_1R = (x.contiguous() for x in inputs)
            found = kernel(x_1D, cos_1R, sin_1R, one)
            assert torch.equal(found.sum_TD, made.sum_TD[rows])
            assert torch.equal(found.normed_TD, made.normed_TD[rows])
            row += 1
    for one, other in (
        (alone.keys_GLC, together.keys_GLC),
        (alone.values_GLZ, together.values_GLZ),
    ):
        assert torch.equal(one, other)
        if isinstance(one, Int8Rows) and isinstance(other, Int8Rows):
            assert torch.equal(one.scales, other.scales)


def test_int8_cache_is_close_to_the_reference() -> None:
    shape, dtype = VARIANTS["plain"], torch.float32
    given_step, block = step(shape, [(9, 1)], dtype), shape.block(dtype)
    kernel = AttentionBlockKernel(at(HERE[-1]), block, dtype, shape.cosines)
    inputs, mine = (
        (given_step.x_TD, given_step.cos_TR, given_step.sin_TR),
        given_step.copy(int8=True),
    )
    sum_TD, _ = plain_attention_block(block, *inputs, given_step.copy())
    made = kernel(*inputs, mine)
    torch.testing.assert_close(made.sum_TD, sum_TD, rtol=0, atol=0.02 * float(sum_TD.abs().max()))
    assert isinstance(mine.keys_GLC, Int8Rows)


@pytest.mark.parametrize(
    ("dtype", "product"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float16,) * 2],
    ids=str,
)
def test_router_is_part_of_the_call(dtype, product) -> None:
    shape, compiled_kernels = Shape(), at(HERE[-1])
    given_step, block = step(shape, [(2, 2)], dtype), shape.block(dtype)
    rule = ScoringRule(score="softmax", chosen="normalised")
    routing = RoutingKernel(
        compiled_kernels, rule, None, experts=6, chosen=2, dtypes=(torch.float32, dtype)
    )
    router = RouterKernel(
        compiled_kernels,
        KernelMatrix(normal(6, shape.hidden, seed=40).to(dtype)),
        normal(6, seed=41),
        product=product,
        logits=torch.float32,
        routing=routing,
    )
    kernel = AttentionBlockKernel(compiled_kernels, block, dtype, shape.cosines)
    inputs = given_step.x_TD, given_step.cos_TR, given_step.sin_TR
    made = kernel(*inputs, given_step.copy(), router)
    logits_TE, chosen = router(made.normed_TD)
    assert made.logits_TE is not None and made.routing is not None
    assert torch.equal(made.logits_TE, logits_TE)
    assert torch.equal(made.routing.ids_TK, chosen.ids_TK)
    assert torch.equal(made.routing.weights_TK, chosen.weights_TK)
    weight = router.matrix.weight
    assert isinstance(weight, Tensor)
    wanted_TE = made.normed_TD.float() @ weight.float().T + normal(6, seed=41)
    torch.testing.assert_close(logits_TE, wanted_TE, rtol=2**-7, atol=2**-7)


def test_other_shapes_are_not_supported() -> None:
    block, dtype = Shape().block(torch.float32), torch.float32
    assert block.supported(dtype, 32)
    for other, cosines in ((replace(block, groups=3), 32), (block, 64), (block, 31)):
        assert not other.supported(dtype, cosines)
    assert not block.supported(torch.float64, 32)
    narrow = Shape(width=24, cosines=24).block(dtype)
    assert not narrow.supported(dtype, 24)
    assert not replace(block, after=norm(64, dtype, seed=1)).supported(dtype, 32)
