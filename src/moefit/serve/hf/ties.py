"""Ties between parameters that a checkpoint does not have.

A config.json may tie the output head to the embedding while the checkpoint has both, with other
values. transformers' loader then leaves both as they are; the model on the meta device has to be
the same, since sizes and the matrices to encode are taken from it.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from moefit.checkpoint.expert_map import direct_sources
from moefit.checkpoint.safetensors import Span, SpanReader, StoredTensor

_PLACES, _BYTES = 64, 4096  # that are compared


def untie_different(model: PreTrainedModel, dense_weights: Mapping[str, StoredTensor]) -> None:
    """Untie parameters that a checkpoint has with other values than those that they are tied to.

    Args:
        model: On the meta device.
        dense_weights: As in `CheckpointMap`.

    Raises:
        CheckpointError: The tensors cannot be read.
    """
    sources = direct_sources(model, dense_weights)
    for target, source in [*model.all_tied_weights_keys.items()]:
        if target not in sources or source not in sources:
            continue
        if _look_equal(dense_weights[sources[target]], dense_weights[sources[source]]):
            continue
        module, _, name = target.rpartition(".")
        own = model.get_parameter(target)
        apart = nn.Parameter(torch.empty_like(own), requires_grad=own.requires_grad)
        setattr(model.get_submodule(module), name, apart)
        del model.all_tied_weights_keys[target]


def _look_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether tensors have equal bytes in places that are spread over them."""
    pairs = [*zip(one.spans, other.spans, strict=False)]
    if len(one.spans) != len(other.spans) or any(
        (a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs
    ):
        return False
    with closing(SpanReader()) as reader:
        return all(
            _part(reader, a, place) == _part(reader, b, place)
            for a, b in pairs
            for place in range(_PLACES)
        )


def _part(reader: SpanReader, span: Span, place: int) -> bytes:
    size = min(_BYTES, span.nbytes)
    data = bytearray(size)
    offset = span.offset + (span.nbytes - size) * place // (_PLACES - 1)
    part = replace(span, offset=offset, nbytes=size, shape=(size,), dtype=torch.uint8)
    reader.read_into(part, memoryview(data))
    return bytes(data)
