"""Gated delta nets (Qwen3-Next, Qwen3.5) as llama.cpp's converters store them.

The converters change values (norms' weights plus one, decays instead of their logarithms), give a
joint projection two tensors, and put the heads of values in the order in which ggml repeats the
heads of keys. The encodings here undo that, so that each weight is what transformers' model has.

Shapes: R rows (output units), C columns (input units).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moefit.checkpoint.formats.encoding import EncodedTensor, Encoding, Parts
from moefit.checkpoint.formats.scaling import row_chunks
from moefit.checkpoint.gguf.encoding import GgmlBlocks
from moefit.checkpoint.gguf.header import GgufTensor
from moefit.checkpoint.safetensors import StoredTensor
from moefit.errors import CheckpointError

Change = Literal["plus_one", "minus_exp"]
"""What a converter did to values: w + 1 or -exp(w)."""
_LAYER = {
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
}
JOINT = _LAYER | {
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",  # of files of 2025
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
}
"""Names in the file of a layer's tensors in Qwen3-Next, whose input projections are joint."""
SPLIT = _LAYER | {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
}
"""The same of Qwen3.5, whose input projections are apart and whose heads of values are moved."""
PIECES = {"attn_qkv.weight": "qkv", "attn_gate.weight": "z"}
"""Tensors that are parts of the joint input projection."""
_PLUS_ONE = ("layernorm.weight", ".q_norm.weight", ".k_norm.weight", "model.norm.weight")
_CONVOLUTION = "linear_attn.conv1d.weight"
_OUT = "linear_attn.out_proj.weight"
_PER_HEAD = ("in_proj_a.weight", "in_proj_b.weight", "linear_attn.dt_bias", "linear_attn.A_log")


class Run(NamedTuple):
    """Rows or columns that are together in the file and in the model.

    Attributes:
        part: The tensor.
        first: The first of them there.
        width: How many.
    """

    part: str
    first: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads of a gated delta net: each of keys belongs to several of values.

    Attributes:
        keys: Number of heads of keys, and of queries.
        values: Number of heads of values, a multiple.
        key_width: Units of a key.
        value_width: Units of a value.
    """

    keys: int
    values: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Heads":
        """Return those of a model with these values of config.json."""
        return cls(
            keys=settings["linear_num_key_heads"],
            values=settings["linear_num_value_heads"],
            key_width=settings["linear_key_head_dim"],
            value_width=settings["linear_value_head_dim"],
        )

    @property
    def are_moved(self) -> bool:
        """Whether ggml's order of heads of values is another one."""
        return 1 < self.keys < self.values

    def in_model_order(self, part: str, first: int, width: int) -> tuple[Run, ...]:
        """Return where heads of values are that the file has in ggml's order.

        The model has the heads of a key together; ggml has the first head of each key, then the
        second one of each.

        Args:
            part: The tensor.
            first: Where they begin there.
            width: Rows or columns of a head.
        """
        each = self.values // self.keys
        return tuple(
            Run(part, first + (number * self.keys + key) * width, width)
            for key in range(self.keys)
            for number in range(each)
        )

    def joint(self) -> tuple[Run, ...]:
        """Return where the rows of the joint projection are: those of a key and its values."""
        keys = self.keys * self.key_width
        values = self.values // self.keys * self.value_width
        runs: list[Run] = []
        for key in range(self.keys):
            runs += (
                Run("qkv", begin + key * self.key_width, self.key_width) for begin in (0, keys)
            )
            runs += (Run("qkv", 2 * keys + key * values, values), Run("z", key * values, values))
        return tuple(runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRows(Encoding):
    """A matrix, or vector, whose rows are runs of rows of one or several tensors.

    Attributes:
        blocks: How each tensor is stored, by its part.
        runs: Where the rows are, in the order of the model.
    """

    blocks: tuple[tuple[str, GgmlBlocks], ...]
    runs: tuple[Run, ...]

    @property
    def format(self) -> str:
        """The types' names."""
        return "/".join(sorted({one.format for _, one in self.blocks}))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        shapes = self._shapes(parts)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def check(self, parts: Parts) -> None:
        """Check the tensors, and that the runs are all of their rows."""
        for part, one in self.blocks:
            one.check({"weight": parts[part]})
        shapes = self._shapes(parts)
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(f"rows of {' and '.join(str([*one]) for one in shapes)} differ")
        for (part, _), shape in zip(self.blocks, shapes, strict=True):
            rows = sum(run.width for run in self.runs if run.part == part)
            if rows != shape[0]:
                raise CheckpointError(f"{part} has {shape[0]} rows, but its heads have {rows}")

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values, run by run."""
        blocks, begin = dict(self.blocks), 0
        for part, first, width in self.runs:
            stored = parts[part][first : first + width]
            blocks[part].decode_into({"weight": stored}, out[begin : begin + width])
            begin += width

    def _shapes(self, parts: Parts) -> list[tuple[int, ...]]:
        return [one.shape({"weight": parts[part]}) for part, one in self.blocks]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedColumns(Encoding):
    """A matrix whose columns are runs of the columns of a tensor.

    Attributes:
        block: How the tensor is stored, `weight`.
        runs: Where the columns are, in the order of the model.
    """

    block: GgmlBlocks
    runs: tuple[Run, ...]

    @property
    def format(self) -> str:
        """The type's name."""
        return self.block.format

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        return self.block.shape(parts)

    def check(self, parts: Parts) -> None:
        """Check the tensor, and that the runs are all of its columns."""
        self.block.check(parts)
        columns, wanted = self.shape(parts)[-1], sum(run.width for run in self.runs)
        if columns != wanted:
            raise CheckpointError(f"it has {columns} columns, but its heads have {wanted}")

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values; a block may be of several heads, so rows are decoded first."""
        order = torch.cat([torch.arange(run.first, run.first + run.width) for run in self.runs])
        for chunk in row_chunks(*out.shape):
            values = torch.empty(out[chunk].shape, dtype=out.dtype)
            self.block.decode_into({"weight": parts["weight"][chunk]}, values)
            torch.index_select(values, 1, order, out=out[chunk])


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(Encoding):
    """A vector whose values a converter has changed one by one.

    Attributes:
        stored: How it is stored.
        change: What was done to each value.
    """

    stored: GgmlBlocks | MovedRows
    change: Change

    @property
    def format(self) -> str:
        """The type's name."""
        return self.stored.format

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        return self.stored.shape(parts)

    def check(self, parts: Parts) -> None:
        """Check the tensor."""
        self.stored.check(parts)

    def decode_into(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the values as they were, computed in float32."""
        values = torch.empty(out.shape)
        self.stored.decode_into(parts, values)
        if self.change == "plus_one":
            out.copy_(values - 1)
            return
        if not bool((values.isfinite() & (values <= 0)).all()):
            raise CheckpointError("it has decays above 0, or that are not finite")
        out.copy_((-values).log_())


def weight_of(
    parameter: str, one: GgufTensor, heads: Heads, dtype: torch.dtype, *, moved: bool
) -> StoredTensor | None:
    """Return a weight that a converter changed or moved; None for others.

    Args:
        parameter: Its name in the model.
        one: Where it is.
        heads: The model's heads.
        dtype: Of the values.
        moved: Whether heads of values are in ggml's order, as in Qwen3.5's files.
    """
    block = GgmlBlocks(type=one.type.name)
    encoding: GgmlBlocks | MovedRows | MovedColumns | Changed = block
    if moved and heads.are_moved and (runs := _runs(parameter, heads)):
        if parameter.endswith(_OUT):
            encoding = MovedColumns(block=block, runs=runs)
        else:
            encoding = MovedRows(blocks=(("weight", block),), runs=runs)
    if not isinstance(encoding, MovedColumns) and (change := _change(parameter)):
        encoding = Changed(stored=encoding, change=change)
    shape = one.shape
    if parameter.endswith(_CONVOLUTION) and len(shape) == 2:  # one input channel for each output
        shape = (shape[0], 1, shape[1])
        if encoding is block and one.type.dtype is not None:
            return replace(one.span, name=parameter, shape=shape)
    if encoding is block:
        return None
    return EncodedTensor(
        name=parameter,
        shape=shape,
        dtype=dtype,
        encoding=encoding,
        parts=(("weight", one.span),),
    )


def joint_projection(
    name: str, parts: Mapping[str, GgufTensor], heads: Heads, dtype: torch.dtype
) -> EncodedTensor:
    """Return the input projection of Qwen3-Next, of which a file has two tensors.

    Args:
        name: Its name in the model.
        parts: Tensors `qkv`, with all queries, then all keys, then all values; and `z`.
        heads: The model's heads.
        dtype: Of the values.
    """
    blocks = tuple((part, GgmlBlocks(type=parts[part].type.name)) for part in ("qkv", "z"))
    encoding = MovedRows(blocks=blocks, runs=heads.joint())
    spans = {part: parts[part].span for part, _ in blocks}
    return EncodedTensor(
        name=name,
        shape=encoding.shape(spans),
        dtype=dtype,
        encoding=encoding,
        parts=tuple(spans.items()),
    )


def _runs(parameter: str, heads: Heads) -> tuple[Run, ...]:
    """Return where a weight's rows are, or its columns; nothing if they are not moved."""
    queries_and_keys = 2 * heads.keys * heads.key_width
    if parameter.endswith((_CONVOLUTION, "in_proj_qkv.weight")):
        moved = heads.in_model_order("weight", queries_and_keys, heads.value_width)
        return (Run("weight", 0, queries_and_keys), *moved)
    if parameter.endswith(("in_proj_z.weight", _OUT)):
        return heads.in_model_order("weight", 0, heads.value_width)
    return heads.in_model_order("weight", 0, 1) if parameter.endswith(_PER_HEAD) else ()


def _change(parameter: str) -> Change | None:
    if parameter.endswith("linear_attn.A_log"):
        return "minus_exp"
    return "plus_one" if parameter.endswith(_PLUS_ONE) else None
