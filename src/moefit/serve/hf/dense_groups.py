"""Group dense weights so that each group is loaded and encoded before the next one is read.

The peak of loading is then the encoded weights and one group in its own dtype, instead of all dense
weights. Only modules whose tensors the checkpoint has one by one form groups: tied weights, and
those that a rule of transformers makes from others, are loaded together at the end.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from transformers import PreTrainedModel

from moefit.checkpoint.expert_map import direct_sources
from moefit.checkpoint.safetensors import StoredTensor
from moefit.moe.families import MoeBlock
from moefit.serve.hf.quant_linear import quantizable_modules

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
    """

    groups: tuple[DenseGroup, ...]
    rest: int

    @property
    def peak(self) -> int:
        """The bytes of weights that are not encoded yet, at most."""
        return max([self.rest, *(one.nbytes for one in self.groups)])


def dense_groups(
    model: PreTrainedModel,
    dense_weights: Mapping[str, StoredTensor],
    blocks: Collection[MoeBlock],
    dtype: torch.dtype,
) -> DenseGroups:
    """Divide the modules that are encoded into groups.

    Args:
        model: On the meta device, with its own experts modules.
        dense_weights: As in `CheckpointMap`.
        blocks: Its MoE blocks.
        dtype: That weights are loaded in.
    """
    source_of = direct_sources(model, dense_weights)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    groups: list[DenseGroup] = []
    rest: dict[int, int] = {}  # by parameter, since tied modules have one
    for name, module in quantizable_modules(model, blocks).items():
        parameters = [f"{name}.{own}" for own, _ in module.named_parameters()]
        if not all(one in source_of and one not in tied for one in parameters):
            weight = module.get_parameter("weight")
            rest[id(weight)] = weight.numel() * dtype.itemsize
            continue
        sources = tuple(source_of[one] for one in parameters)
        nbytes = sum(_bytes_of(dense_weights[one], dtype) for one in sources)
        last = groups[-1] if groups else None
        if last is None or last.nbytes + nbytes > GROUP_BYTES:
            groups.append(DenseGroup((name,), sources, nbytes))
        else:
            groups[-1] = DenseGroup(
                (*last.modules, name), (*last.sources, *sources), last.nbytes + nbytes
            )
    return DenseGroups(tuple(groups), sum(rest.values()))


def _bytes_of(stored: StoredTensor, dtype: torch.dtype) -> int:
    """Return what a tensor takes while it is loaded: as stored too, if that is another dtype."""
    count = prod(stored.shape)
    return count * dtype.itemsize + (0 if stored.dtype == dtype else count * stored.dtype.itemsize)
