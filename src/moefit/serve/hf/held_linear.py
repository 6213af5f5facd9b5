"""Keep the linear layers of a quantised checkpoint in its own codes.

transformers' loader decodes them to the model's dtype, in which they take two to four times the
memory, and as much more of a token's time. Here they are read as experts are: codes are reordered
for the kernels, and nothing is rounded. Embeddings, tied weights, routers, and weights that
transformers makes from several tensors are loaded by it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.checkpoint.expert_map import direct_sources
from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.checkpoint.safetensors import Checkpoint, StoredTensor
from moefit.moe.families import MoeBlock, ScaledCodes
from moefit.quant.cpu_kernels import kernels
from moefit.quant.scaled.held import FilledMatrix, HeldMatrix, held_bytes, held_matrix
from moefit.serve.cache.slot import host_bytes
from moefit.serve.hf.dense_groups import DenseGroup, DenseGroups
from moefit.serve.hf.quant_linear import EncodedLinear, modules_by_weight, quantizable_modules

_ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True, slots=True)
class HeldLinear:
    """A linear layer whose weight stays as it is stored.

    Args:
        weight: The weight in the checkpoint.
        codes: How memory holds it.
        sources: The tensors of the checkpoint that fill its other parameters.
    """

    weight: EncodedTensor
    codes: ScaledCodes
    sources: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of its codes, and of its metadata."""
        rows, cols = self.weight.shape
        return held_bytes(rows, cols, self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(map(_aligned, self.sizes))

    def matrix(self, buffer_B: Tensor) -> HeldMatrix:
        """Return the matrix at the beginning of a buffer."""
        codes, meta = self.sizes
        start = _aligned(codes)
        cols = self.weight.shape[1]
        return held_matrix(self.codes, cols, buffer_B[:codes], buffer_B[start : start + meta])


def held_linears(
    model: PreTrainedModel,
    dense_weights: Mapping[str, StoredTensor],
    blocks: Collection[MoeBlock],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, HeldLinear]:
    """Return the linear layers that can stay in the checkpoint's codes, by name.

    None in float32, as with experts, and none without kernels, since torch would decode them at
    each step.

    Args:
        model: On the meta device, with its own experts modules.
        dense_weights: As in `CheckpointMap`.
        blocks: Its MoE blocks.
        dtype: That the model computes in.
        device: That it computes on.
    """
    is_quantised = any(isinstance(one, EncodedTensor) for one in dense_weights.values())
    if not is_quantised or device.type != "cpu" or dtype.itemsize != 2 or kernels() is None:
        return {}
    direct = direct_sources(model, dense_weights)
    tied = {one for pair in model.all_tied_weights_keys.items() for one in pair}
    in_float32 = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    modules = quantizable_modules(model, blocks)
    found = {}
    for names in modules_by_weight(modules).values():
        name, weight = names[0], f"{names[0]}.weight"
        stored = dense_weights.get(direct.get(weight, ""))
        others = [one for one, _ in modules[name].named_parameters() if one != "weight"]
        sources = [direct.get(f"{name}.{one}", "") for one in others]
        if (
            len(names) == 1
            and weight not in tied
            and not any(pattern.search(weight) for pattern in in_float32)
            and isinstance(modules[name], nn.Linear)
            and isinstance(stored, EncodedTensor)
            and stored.shape == tuple(modules[name].get_parameter("weight").shape)
            and (codes := stored.scaled_codes) is not None
            and not codes.transposed
            and all(sources)
        ):
            found[name] = HeldLinear(stored, codes, tuple(sources))
    return found


def saved_by_holding(linears: Mapping[str, HeldLinear], itemsize: int) -> int:
    """Return the bytes that these layers save, compared with values of `itemsize` bytes."""
    return sum(
        one.weight.shape[0] * one.weight.shape[1] * itemsize - one.nbytes
        for one in linears.values()
    )


def reading_bytes(linears: Mapping[str, HeldLinear]) -> int:
    """Return what reading the largest of these layers takes besides its place."""
    return max((one.weight.working_bytes for one in linears.values()), default=0)


class HeldLoader:
    """Read linear layers in a checkpoint's codes, while transformers loads everything else.

    Args:
        model: The model; weights of these layers are not loaded.
        linears: The layers.
        checkpoint: Its files.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, HeldLinear], checkpoint: Checkpoint):
        self._model, self._linears, self._checkpoint = model, linears, checkpoint
        self._made: dict[str, EncodedLinear] = {}
        total = sum(one.nbytes for one in linears.values())
        # In one mapping, so that nearly all of it is huge pages.
        self._free_B = host_bytes(total) if total else torch.empty(0, dtype=torch.uint8)

    def groups(self, dense_weights: Mapping[str, StoredTensor]) -> DenseGroups:
        """Return one group of all layers: their biases are loaded, and their weights are not."""
        if not self._linears:
            return DenseGroups((), 0)
        sources = [source for one in self._linears.values() for source in one.sources]
        weights = {id(one.weight) for one in self._linears.values()}
        skipped = tuple(name for name, one in dense_weights.items() if id(one) in weights)
        return DenseGroups((DenseGroup(tuple(self._linears), tuple(sources), 0),), 0, skipped)

    def read(self, names: Collection[str]) -> None:
        """Read layers whose biases are loaded.

        Empty modules stand for them until `place`, as for those that are encoded.

        Raises:
            CheckpointError: A weight is damaged or cannot be read.
        """
        for name in names:
            one, module = self._linears[name], self._model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            mine_B, self._free_B = self._free_B[: one.nbytes], self._free_B[one.nbytes :]
            matrix = one.matrix(mine_B)
            FilledMatrix(matrix).fill(0, one.weight.read_codes(self._checkpoint.reader))
            bias = None if module.bias is None else module.bias.detach()
            self._made[name] = EncodedLinear(matrix, bias, module.weight.dtype)
            self._model.set_submodule(name, nn.Module())

    def place(self) -> None:
        """Put the layers in the model."""
        for name, module in self._made.items():
            self._model.set_submodule(name, module)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
