"""Group dense weights so that each group is loaded and encoded before the next one is read.

The peak of loading is then the encoded weights and one group in its own dtype, instead of all dense
weights. Only modules whose tensors the checkpoint has one by one form groups: tied weights, and
those that a rule of transformers makes from others, are loaded together at the end. Of modules
whose weights are packed, only biases are loaded.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from transformers import PreTrainedModel

from moefit.checkpoint.expert_map import direct_sources, parameter_names
from moefit.checkpoint.safetensors import StoredTensor
from moefit.moe.families import MoeBlock
from moefit.serve.hf.quant_linear import modules_by_weight, quantizable_modules

GROUP_BYTES = 128 << 20  # a larger matrix is a group of its own


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """Modules that are loaded and encoded together.

    Args:
        modules: Their names.
        sources: The tensors of the checkpoint that fill them.
        nbytes: Of their weights before they are encoded, with the stored ones if those differ.
    """

    modules: tuple[str, ...]
    sources: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class DenseGroups:
    """How the dense weights of a model are loaded to be encoded.

    Args:
        groups: Loaded one after the other.
        rest: Bytes of the modules that are encoded after all weights have been loaded.
        skipped: Tensors that are not loaded, since what they fill is encoded already.
    """

    groups: tuple[DenseGroup, ...]
    rest: int
    skipped: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The bytes of weights that are not encoded yet, at most."""
        return max([self.rest, *(one.nbytes for one in self.groups)])


def dense_groups(
    model: PreTrainedModel,
    dense_weights: Mapping[str, StoredTensor],
    blocks: Collection[MoeBlock],
    dtype: torch.dtype,
    encoded: Collection[str] = (),
) -> DenseGroups:
    """Divide the modules that are encoded into groups.

    Args:
        model: On the meta device, with its own experts modules.
        dense_weights: As in `CheckpointMap`.
        blocks: Its MoE blocks.
        dtype: That weights are loaded in.
        encoded: Names as in `EncodedMatrices`, of modules whose weights need not be loaded.
    """
    sources = _Sources(model, dense_weights)
    groups: list[DenseGroup] = []
    skipped: list[str] = []
    rest = 0
    modules = quantizable_modules(model, blocks)
    for weight, names in modules_by_weight(modules).items():
        own = {f"{name}.{one}" for name in names for one, _ in modules[name].named_parameters()}
        matrices = {f"{name}.weight" for name in names}
        if (
            names[0] in encoded
            and sources.can_skip(matrices)
            and sources.are_direct(own - matrices)
        ):
            skipped += sources.direct_of(matrices)
            own -= matrices
        elif not sources.are_direct(own) or sources.are_tied(own):
            rest += weight.numel() * dtype.itemsize
            continue
        found = tuple(sources.direct_of(own))
        nbytes = sum(_bytes_of(dense_weights[one], dtype) for one in found)
        last = groups[-1] if groups else None
        if last is None or last.nbytes + nbytes > GROUP_BYTES:
            groups.append(DenseGroup(tuple(names), found, nbytes))
        else:
            groups[-1] = DenseGroup(
                (*last.modules, *names), (*last.sources, *found), last.nbytes + nbytes
            )
    return DenseGroups(tuple(groups), rest, tuple(skipped))


class _Sources:
    """The tensors of a checkpoint that fill a model's parameters."""

    def __init__(self, model: PreTrainedModel, dense_weights: Mapping[str, StoredTensor]):
        self._direct = direct_sources(model, dense_weights)
        filled = set(parameter_names(model, dense_weights).values())
        self._by_rule = filled - self._direct.keys()
        self._ties = [set(pair) for pair in model.all_tied_weights_keys.items()]

    def direct_of(self, parameters: Collection[str]) -> list[str]:
        """Return the tensors that fill parameters without a rule."""
        return [self._direct[one] for one in sorted(parameters) if one in self._direct]

    def are_direct(self, parameters: Collection[str]) -> bool:
        """Return whether each parameter is filled by one tensor, without a rule."""
        return all(one in self._direct for one in parameters)

    def are_tied(self, parameters: Collection[str]) -> bool:
        """Return whether a parameter is tied to another."""
        return any(pair.intersection(parameters) for pair in self._ties)

    def can_skip(self, matrices: Collection[str]) -> bool:
        """Return whether no other parameter needs the tensors of these, which share a weight."""
        return (
            bool(self._direct.keys() & matrices)
            and not self._by_rule.intersection(matrices)
            and all(pair <= set(matrices) or not pair & set(matrices) for pair in self._ties)
        )


def _bytes_of(stored: StoredTensor, dtype: torch.dtype) -> int:
    """Return what a tensor takes while it is loaded: as stored too, if that is another dtype."""
    count = prod(stored.shape)
    return count * dtype.itemsize + (0 if stored.dtype == dtype else count * stored.dtype.itemsize)
