"""Quantise dense weights: attention, shared experts, embeddings and the output head.

`EncodedLinear` computes from any codes, those of a checkpoint too (`held_linear.py`).
`quantize_dense_weights` replaces a model's `nn.Linear` and `nn.Embedding` modules by modules that
compute from grouped integers. Routers keep their precision, because an error in a router changes
which experts are chosen. Byte counts for the budget estimate are computed from shapes alone.

Shapes: T tokens, D model width, I input features, O output features, R rows of a matrix.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefit.graphs import outside_of_graphs
from moefit.moe.families import MoeBlock
from moefit.quant.backend import backend, decoded
from moefit.quant.cpu_kernels import KernelMatrix
from moefit.quant.encode import encode_into
from moefit.quant.encoded_weight import EncodedWeight
from moefit.quant.format import GroupedFormat
from moefit.quant.grouped_int import (
    GROUP,
    SLAB,
    GroupedMatrix,
    codes_bytes,
    meta_bytes,
    meta_per_group,
)
from moefit.quant.scaled.held import HeldMatrix
from moefit.serve.cache.slot import host_bytes

CodedMatrix = GroupedMatrix | HeldMatrix
_MIN_WEIGHTS = GROUP * GROUP  # smaller matrices save nothing
_ALIGNMENT = 64  # bytes: a cache line
_MAX_DECODED_BYTES = 16 << 20  # decoded at a time; the output head has as many rows as tokens


class EncodedMatrices(Protocol):
    """Matrices that are encoded already, by the first name of the modules that use them."""

    @property
    def names(self) -> Collection[str]:
        """The names."""
        ...

    def read(self, name: str, into: GroupedMatrix) -> None:
        """Fill a matrix. Raises CheckpointError if it is damaged or cannot be read."""
        ...


class EncodedLinear(nn.Module):
    """Linear layer y = x W^T + b with W in codes: grouped integers, or those of a checkpoint."""

    def __init__(self, matrix: CodedMatrix, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = matrix.cols, matrix.rows, dtype
        nothing = matrix.codes_RB.new_empty(0)
        self._form = replace(matrix, codes_RB=nothing, meta_RMG=nothing)  # but its memory
        self._kernel_matrix: KernelMatrix | None = None
        self.register_buffer("codes_RB", matrix.codes_RB, persistent=False)
        self.register_buffer("meta_RMG", matrix.meta_RMG, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.float_bias: Tensor | None = None if bias is None else bias.float()

    @property
    def matrix(self) -> CodedMatrix:
        """Return W."""
        codes_RB, meta_RMG = self.get_buffer("codes_RB"), self.get_buffer("meta_RMG")
        return replace(self._form, codes_RB=codes_RB, meta_RMG=meta_RMG)

    @property
    def weight(self) -> Tensor:
        """Return W for code that reads it, such as Jamba's; it is decoded if it is used."""
        return EncodedWeight.of(self.matrix, self.dtype)

    @property
    def kernel_matrix(self) -> KernelMatrix:
        """Return W as kernels take it."""
        if self._kernel_matrix is None:
            self._kernel_matrix = KernelMatrix(self.matrix)
        return self._kernel_matrix

    @outside_of_graphs
    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        if compiled := backend(x.device):
            y_TO = compiled.linear(x_TI, self.kernel_matrix, x.dtype, self.float_bias)
        else:
            y_TO = self._decode_and_multiply(x_TI)
            if self.bias is not None:
                y_TO = y_TO + self.get_buffer("bias")
        return y_TO.view(*x.shape[:-1], self.out_features)

    def _decode_and_multiply(self, x_TI: Tensor) -> Tensor:
        """Compute with torch's matrix products, decoding a limited number of rows at a time."""
        rows = max_decoded_rows(self.in_features, x_TI.element_size())
        if rows >= self.out_features:
            return F.linear(x_TI, decoded(self.matrix, x_TI.dtype))
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        for part, y_TR in zip(self.matrix.split(rows), y_TO.split(rows, dim=1), strict=True):
            y_TR.copy_(F.linear(x_TI, decoded(part, x_TI.dtype)))
        return y_TO

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Moving or converting the buffers invalidates the pointers that the kernels use.
        self._kernel_matrix = None
        super()._apply(fn, recurse)
        self.float_bias = None if self.bias is None else self.get_buffer("bias").float()
        return self


class GroupedEmbedding(nn.Module):
    """Embedding with its table in grouped integers; rows are decoded at each lookup."""

    def __init__(self, matrix: GroupedMatrix, padding_idx: int | None, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.cols
        self.padding_idx, self.dtype, self._bits = padding_idx, dtype, matrix.bits
        self.register_buffer("codes_RB", matrix.codes_RB, persistent=False)
        self.register_buffer("meta_RMG", matrix.meta_RMG, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Return the table for code that reads it, such as Llama 4's; decoded if it is used."""
        codes_RB, meta_RMG = self.get_buffer("codes_RB"), self.get_buffer("meta_RMG")
        matrix = GroupedMatrix(self._bits, self.embedding_dim, codes_RB, meta_RMG)
        return EncodedWeight.of(matrix, self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to embeddings [..., D]."""
        ids_T = ids.flatten()
        codes_RB, meta_RMG = self.get_buffer("codes_RB"), self.get_buffer("meta_RMG")
        if len(ids_T) == 1 and (row := int(ids_T)) < self.num_embeddings // SLAB * SLAB:
            # Decoding the slab that has the row is faster than taking the row out of it.
            rows = slice(row // SLAB * SLAB, row // SLAB * SLAB + SLAB)
            slab = GroupedMatrix(self._bits, self.embedding_dim, codes_RB[rows], meta_RMG[rows])
            row_1D = decoded(slab, self.dtype)[row % SLAB]
            return row_1D.view(*ids.shape, self.embedding_dim)
        matrix = GroupedMatrix(self._bits, self.embedding_dim, codes_RB, meta_RMG)
        return decoded(matrix.take(ids_T), self.dtype).view(*ids.shape, self.embedding_dim)


def quantizable_modules(model: nn.Module, blocks: Collection[MoeBlock]) -> dict[str, nn.Module]:
    """Return the modules that `quantize_dense_weights` replaces, by name.

    Modules with tied weights are listed under each of their names; none if a module of another
    class has the weight too, such as an embedding that scales its outputs.
    """
    experts = tuple(f"{block.name}." for block in blocks)
    routers = tuple(f"{name}." for name in _routers(model, blocks))
    found, others = {}, set[int]()
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            if not f"{name}.".startswith((*experts, *routers)):
                found[name] = module
        else:
            others |= {id(one) for one in module._parameters.values()}
    return {
        name: module
        for name, module in found.items()
        if module.get_parameter("weight").numel() >= _MIN_WEIGHTS
        and id(module.weight) not in others
    }


def _routers(model: nn.Module, blocks: Collection[MoeBlock]) -> list[str]:
    """Return the names of modules that have a parameter with one row per expert."""
    return [
        f"{block.parent}.{name}"
        for block in blocks
        for name, module in model.get_submodule(block.parent).named_modules()
        if name
        and any(
            len(parameter) == block.num_experts
            for parameter in module.parameters(recurse=False)
            if parameter.dim()
        )
    ]


def quantize_dense_weights(
    model: nn.Module,
    format: GroupedFormat,
    blocks: Collection[MoeBlock],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Replace linear layers and embeddings by quantised ones, in place.

    Modules that share a weight (tied embeddings) share its codes. Each original weight is freed
    after it is encoded, so the peak is the model, one encoded matrix and a few rows in float32.

    Args:
        model: The model, with its dense weights loaded.
        format: The format to encode in.
        blocks: The model's MoE blocks; their experts and routers are not replaced.
        progress: Callback with the number of matrices done and in total.

    Returns:
        The names of the replaced modules.
    """
    device = next(model.parameters()).device
    encoder = DenseEncoder(model, format, blocks, device, progress)
    encoder.encode()
    return encoder.place()


class DenseEncoder:
    """Encode linear layers and embeddings, some at a time, and replace them by quantised ones.

    Args:
        model: The model; its weights need not be loaded yet.
        format: The format to encode in.
        blocks: The model's MoE blocks; their experts and routers are not replaced.
        device: That weights are on once they are loaded.
        progress: Callback with the number of matrices done and in total.
        packed: Matrices that are read instead, whose weights need not be loaded at all.
    """

    def __init__(
        self,
        model: nn.Module,
        format: GroupedFormat,
        blocks: Collection[MoeBlock],
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
        packed: EncodedMatrices | None = None,
    ):
        self._model, self._format, self._blocks = model, format, blocks
        self._progress, self._done, self._packed = progress, 0, packed
        self._made: dict[str, nn.Module] = {}
        weights = modules_by_weight(quantizable_modules(model, blocks))
        self._total = len(weights)
        self._arena = _Arena(weights, format.bits) if device.type == "cpu" else None

    def encode(self, names: Collection[str] | None = None) -> None:
        """Encode the weights of modules, which are loaded; `place` replaces the modules.

        Args:
            names: Of the modules; None for all that remain.
        """
        release_weights(self._model, self._blocks, self._encode, names)

    def _encode(self, weight: Tensor, owners: Mapping[str, nn.Module]) -> None:
        rows, cols = weight.shape
        if self._arena is None or not weight.numel():
            matrix = GroupedMatrix.empty(rows, cols, self._format.bits)
        else:
            matrix = self._arena.allocate(rows, cols)
        first = next(iter(owners))
        if self._packed is not None and first in self._packed.names:
            self._packed.read(first, matrix)
        else:
            encode_into(matrix, weight.detach(), self._format.encoder)
        for name, module in owners.items():
            self._made[name] = _quantized_module(module, matrix, weight.dtype)
        self._done += 1
        self._progress(self._done, self._total)

    def place(self) -> tuple[str, ...]:
        """Put the quantised modules in the model, and return their names."""
        for name, module in self._made.items():
            self._model.set_submodule(name, module)
        return tuple(self._made)


def release_weights(
    model: nn.Module,
    blocks: Collection[MoeBlock],
    use: Callable[[Tensor, Mapping[str, nn.Module]], None],
    names: Collection[str] | None = None,
) -> None:
    """Pass each weight of modules that are encoded to a function, and free it then.

    Empty modules stand for them from then on, since transformers' loader would take codes for
    buffers that it has to initialise.

    Args:
        model: The model.
        blocks: Its MoE blocks.
        use: Takes a weight, and the modules that use it by name.
        names: Of the modules; None for all that remain.
    """
    remaining = quantizable_modules(model, blocks)
    modules = remaining if names is None else {name: remaining[name] for name in names}
    for weight, owners in modules_by_weight(modules).items():
        use(weight, {name: modules[name] for name in owners})
        for name in owners:
            model.set_submodule(name, nn.Module())
        weight.data = weight.new_empty(0)


class _Arena:
    """Memory for encoded matrices on a CPU in one mapping, so that nearly all of it is huge pages.

    A page is allocated when it is first written, so the arena may exist before weights are freed.

    Args:
        weights: All that will be encoded there, possibly on the meta device.
        bits: Per weight.
    """

    def __init__(self, weights: Collection[Tensor], bits: int):
        self._bits = bits
        total = sum(self._size(*weight.shape) for weight in weights)
        self._free_B = host_bytes(total) if total else torch.empty(0, dtype=torch.uint8)

    def allocate(self, rows: int, cols: int) -> GroupedMatrix:
        """Return an empty matrix for one of the weights."""
        size = self._size(rows, cols)
        mine_B, self._free_B = self._free_B[:size], self._free_B[size:]
        return matrix_over(mine_B, rows, cols, self._bits)

    def _size(self, rows: int, cols: int) -> int:
        return -(-encoded_bytes(rows, cols, self._bits) // _ALIGNMENT) * _ALIGNMENT


def matrix_over(buffer_B: Tensor, rows: int, cols: int, bits: int) -> GroupedMatrix:
    """Return a matrix at the beginning of a buffer: codes, then scales and minima."""
    codes, meta = codes_bytes(rows, cols, bits), meta_bytes(rows, cols, bits)
    codes_B, meta_B = buffer_B[: codes + meta].split([codes, meta])
    meta_RMG = meta_B.view(torch.float16).view(rows, meta_per_group(bits), -1)
    return GroupedMatrix(bits, cols, codes_B.view(rows, -1), meta_RMG)


def encoded_bytes(rows: int, cols: int, bits: int) -> int:
    """Return the bytes of an encoded matrix."""
    return codes_bytes(rows, cols, bits) + meta_bytes(rows, cols, bits)


def modules_by_weight(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, list[str]]:
    """Return each distinct weight with the names of the modules that use it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module.get_parameter("weight"), []).append(name)
    return names


def _quantized_module(module: nn.Module, matrix: GroupedMatrix, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return GroupedEmbedding(matrix, module.padding_idx, dtype)
    assert isinstance(module, nn.Linear)
    return EncodedLinear(matrix, None if module.bias is None else module.bias.detach(), dtype)


def max_decoded_rows(cols: int, itemsize: int) -> int:
    """Return how many rows of a matrix are decoded at a time for a step of many tokens.

    >>> max_decoded_rows(2048, 2)
    4096
    """
    return max(SLAB, _MAX_DECODED_BYTES // (cols * itemsize) // SLAB * SLAB)


def decoded_bytes(model: nn.Module, blocks: Collection[MoeBlock], itemsize: int) -> int:
    """Return the peak bytes of decoded rows in a step of many tokens.

    Args:
        model: A model, possibly on the meta device.
        blocks: Its MoE blocks.
        itemsize: Bytes per decoded weight.
    """
    shapes = [
        one.weight.shape
        for one in quantizable_modules(model, blocks).values()
        if isinstance(one, nn.Linear)
    ]
    return max(
        (min(rows, max_decoded_rows(cols, itemsize)) * cols * itemsize for rows, cols in shapes),
        default=0,
    )


def saved_bytes(
    model: nn.Module, format: GroupedFormat, blocks: Collection[MoeBlock], itemsize: int
) -> int:
    """Return the bytes that quantising the dense weights saves.

    Args:
        model: A model, possibly on the meta device.
        format: The format to encode in.
        blocks: Its MoE blocks.
        itemsize: Bytes per weight before encoding.
    """
    return sum(
        weight.numel() * itemsize - _encoded_bytes(weight, format)
        for weight in modules_by_weight(quantizable_modules(model, blocks))
    )


def largest_encoded(model: nn.Module, format: GroupedFormat, blocks: Collection[MoeBlock]) -> int:
    """Return the bytes of the largest encoded matrix, which exists beside the original.

    Args:
        model: A model, possibly on the meta device.
        format: The format to encode in.
        blocks: Its MoE blocks.
    """
    weights = modules_by_weight(quantizable_modules(model, blocks))
    return max((_encoded_bytes(weight, format) for weight in weights), default=0)


def _encoded_bytes(weight: Tensor, format: GroupedFormat) -> int:
    rows, cols = weight.shape
    return encoded_bytes(rows, cols, format.bits)
