"""The weights that are no experts, encoded too: attention, shared experts, embeddings, head.

Owns modules that compute from grouped integers, and what may be replaced by them: linear layers and
embeddings of torch's own classes, but no router, whose choices decide everything behind them. One
visible call replaces modules, one after the other, and says what it replaced.

Shapes: T tokens, I input units, O output units, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.moe.families import MoeBlock
from moefit.quant.backend import backend, decoded
from moefit.quant.cpu_kernels import KernelMatrix
from moefit.quant.encode import encode_into
from moefit.quant.format import GroupedFormat
from moefit.quant.grouped_int import (
    GROUP,
    SLAB,
    GroupedMatrix,
    codes_bytes,
    meta_bytes,
    meta_per_group,
)
from moefit.serve.cache.slot import host_bytes

_SMALLEST = GROUP * GROUP  # weights; below, there is nothing to be saved
_DECODED = (
    16 << 20
)  # bytes that a step of many tokens decodes at once; a vocabulary's rows are many


class GroupedLinear(nn.Module):
    """y = x W^T + b, with W in grouped integers."""

    def __init__(self, matrix: GroupedMatrix, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = matrix.cols, matrix.rows, dtype
        self._bits = matrix.bits
        self._argument: KernelMatrix | None = None
        self.register_buffer("codes_RB", matrix.codes_RB, persistent=False)
        self.register_buffer("meta_RMG", matrix.meta_RMG, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def matrix(self) -> GroupedMatrix:
        """W."""
        return GroupedMatrix(
            self._bits, self.in_features, self.get_buffer("codes_RB"), self.get_buffer("meta_RMG")
        )

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        compiled = backend(x.device)
        if compiled and x_TI.shape[0] <= compiled.few:
            if self._argument is None:
                self._argument = KernelMatrix(self.matrix)
            y_TO = compiled.linear(x_TI, self._argument, x.dtype)
        else:
            y_TO = self._by_parts(x_TI)
        if isinstance(self.bias, Tensor):
            y_TO = y_TO + self.bias
        return y_TO.view(*x.shape[:-1], self.out_features)

    def _by_parts(self, x_TI: Tensor) -> Tensor:
        """By torch's own products, so many output units at a time as may be decoded at once."""
        rows = rows_decoded(self.in_features, x_TI.element_size())
        if rows >= self.out_features:
            return F.linear(x_TI, decoded(self.matrix, x_TI.dtype))
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        for part, y_TR in zip(self.matrix.split(rows), y_TO.split(rows, dim=1), strict=True):
            y_TR.copy_(F.linear(x_TI, decoded(part, x_TI.dtype)))
        return y_TO

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moved or converted: the kernels' argument is of memory that is no longer used."""
        self._argument = None
        return super()._apply(fn, recurse)


class GroupedEmbedding(nn.Module):
    """Rows of a matrix of grouped integers, decoded as they are asked for."""

    def __init__(self, matrix: GroupedMatrix, padding_idx: int | None, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.cols
        self.padding_idx, self.dtype, self._bits = padding_idx, dtype, matrix.bits
        self.register_buffer("codes_RB", matrix.codes_RB, persistent=False)
        self.register_buffer("meta_RMG", matrix.meta_RMG, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[..] -> [.., D]."""
        ids_T = ids.flatten()
        matrix = GroupedMatrix(
            self._bits, self.embedding_dim, self.get_buffer("codes_RB"), self.get_buffer("meta_RMG")
        )
        return decoded(matrix.take(ids_T), self.dtype).view(*ids.shape, self.embedding_dim)


def encodable(model: nn.Module, blocks: Collection[MoeBlock]) -> dict[str, nn.Module]:
    """What would be encoded, by name; tied modules each under their own."""
    experts = tuple(f"{block.name}." for block in blocks)
    routers = tuple(f"{name}." for name in _routers(model, blocks))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
        and not f"{name}.".startswith((*experts, *routers))
        and module.get_parameter("weight").numel() >= _SMALLEST
    }


def _routers(model: nn.Module, blocks: Collection[MoeBlock]) -> list[str]:
    """Modules beside a block's experts with something for each expert."""
    return [
        f"{block.parent}.{name}"
        for block in blocks
        for name, module in model.get_submodule(block.parent).named_modules()
        if name
        and any(len(p) == block.num_experts for p in module.parameters(recurse=False) if p.dim())
    ]


def quantize_dense_weights(
    model: nn.Module,
    format: GroupedFormat,
    blocks: Collection[MoeBlock],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Replace linear layers and embeddings by encoded ones, in place; returns their names.

    Modules with one weight (tied embeddings) share its codes. Beside the model, one encoded matrix
    and some rows as float32 are in memory at a time. progress hears how many matrices are done.
    """
    found = encodable(model, blocks)
    weights = _by_weight(found)
    for done, (weight, names) in enumerate(weights.items(), start=1):
        matrix = _room_for(weight, format.bits)
        encode_into(matrix, weight.detach(), format.encoder)
        for name in names:
            model.set_submodule(name, _encoded(found[name], matrix, weight.dtype))
        weight.data = weight.new_empty(0)
        progress(done, len(weights))
    return tuple(found)


def _room_for(weight: Tensor, bits: int) -> GroupedMatrix:
    """On a CPU as slots lie: huge pages save address translation."""
    rows, cols = weight.shape
    codes, meta = codes_bytes(rows, cols, bits), meta_bytes(rows, cols, bits)
    if weight.device.type != "cpu" or not codes:
        return GroupedMatrix.empty(rows, cols, bits)
    codes_B, meta_B = host_bytes(codes + meta).split([codes, meta])
    meta_RMG = meta_B.view(torch.float16).view(rows, meta_per_group(bits), -1)
    return GroupedMatrix(bits, cols, codes_B.view(rows, -1), meta_RMG)


def _by_weight(found: Mapping[str, nn.Module]) -> dict[nn.Parameter, list[str]]:
    """The modules' weights, each once, with the names of those that have it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, module in found.items():
        names.setdefault(module.get_parameter("weight"), []).append(name)
    return names


def _encoded(module: nn.Module, matrix: GroupedMatrix, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return GroupedEmbedding(matrix, module.padding_idx, dtype)
    assert isinstance(module, nn.Linear)
    return GroupedLinear(matrix, None if module.bias is None else module.bias.detach(), dtype)


def rows_decoded(cols: int, itemsize: int) -> int:
    """Of a matrix, how many rows a step of many tokens decodes at once.

    >>> rows_decoded(2048, 2)
    4096
    """
    return max(SLAB, _DECODED // (cols * itemsize) // SLAB * SLAB)


def decoded_bytes(model: nn.Module, blocks: Collection[MoeBlock], itemsize: int) -> int:
    """The most of a matrix that a step of many tokens decodes at once."""
    shapes = [
        one.weight.shape for one in encodable(model, blocks).values() if isinstance(one, nn.Linear)
    ]
    return max(
        (min(rows, rows_decoded(cols, itemsize)) * cols * itemsize for rows, cols in shapes),
        default=0,
    )


def saved_bytes(
    model: nn.Module, format: GroupedFormat, blocks: Collection[MoeBlock], itemsize: int
) -> int:
    """Bytes that encoding takes off the weights, before anything is loaded."""
    return sum(
        weight.numel() * itemsize
        - codes_bytes(len(weight), weight.shape[1], format.bits)
        - meta_bytes(len(weight), weight.shape[1], format.bits)
        for weight in _by_weight(encodable(model, blocks))
    )
