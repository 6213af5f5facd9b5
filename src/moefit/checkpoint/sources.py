"""Read one expert's tensors from a checkpoint.

`ExpertSource` is the interface. `ByteRange` reads bytes straight into place, `DecodedRange` decodes
a quantised weight into place, `Conversion` applies transformers' own operations to checkpoint
tensors, and `CompositeSource` joins the parts of one
expert. `expert_map.py` finds the sources of a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from moefit.checkpoint.formats.encoding import CodesTarget, EncodedTensor
from moefit.checkpoint.safetensors import (
    Checkpoint,
    Span,
    StoredTensor,
    bytes_of,
    value_bytes,
)
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief
from moefit.moe.families import ScaledCodes, TensorSpec

Targets = Mapping[str, Tensor | CodesTarget]
"""One expert's tensors by short name, or what holds them as they are stored."""


class ExpertSource(ABC):
    """Where the tensors of one expert, or some of them, come from."""

    __slots__ = ()

    @property
    @abstractmethod
    def spans(self) -> tuple[Span, ...]:
        """Byte ranges of the checkpoint's files that are read."""

    @property
    @abstractmethod
    def formats(self) -> frozenset[str]:
        """How the checkpoint stores them, for reports: dtypes, and formats of quantised weights."""

    @property
    def nbytes(self) -> int:
        """Bytes read from the checkpoint's files."""
        return sum(span.nbytes for span in self.spans)

    @property
    @abstractmethod
    def staging_bytes(self) -> int:
        """Upper bound on the bytes held in memory while reading, besides the target tensors."""

    @property
    @abstractmethod
    def held(self) -> Mapping[str, ScaledCodes | None]:
        """How memory can hold each tensor as it is stored; None if it cannot."""

    @abstractmethod
    def read_into(self, checkpoint: Checkpoint, tensors: Targets) -> None:
        """Fill the expert's tensors in host memory, given by short name.

        Tensors are in the model's dtypes; those that `held` describes may be `CodesTarget`s
        instead.

        Raises:
            CheckpointError: The checkpoint cannot be read or converted. The tensors' content is
                then undefined.
            UnsupportedModelError: Conversion results in a shape that the model does not use.
        """

    @abstractmethod
    def values(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Yield the values in one or more tensors of any shape; raise as `read_into` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange(ExpertSource):
    """Bytes of a file that are copied unchanged into one of the expert's tensors.

    Attributes:
        tensor: Short name of the tensor.
        start: Offset in the tensor, in bytes.
        span: The bytes in the file.
    """

    tensor: str
    start: int
    span: Span

    @property
    def spans(self) -> tuple[Span, ...]:
        """The single span."""
        return (self.span,)

    @property
    def formats(self) -> frozenset[str]:
        """The span's dtype."""
        return frozenset({self.span.format})

    @property
    def held(self) -> Mapping[str, ScaledCodes | None]:
        """No codes."""
        return {self.tensor: None}

    @property
    def staging_bytes(self) -> int:
        """0: bytes are read straight into place."""
        return 0

    def read_into(self, checkpoint: Checkpoint, tensors: Targets) -> None:
        """Read the span into its part of the tensor."""
        part = bytes_of(_tensor(tensors, self.tensor))[self.start : self.start + self.nbytes]
        checkpoint.reader.read_into(self.span, part)

    def values(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Yield the span as one tensor."""
        yield checkpoint.tensor(self.span)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRange(ExpertSource):
    """A quantised weight that is decoded into one of the expert's tensors, or into a part of it.

    Attributes:
        tensor: Short name of the tensor.
        start: Offset in the tensor, in bytes.
        weight: The weight, in the tensor's dtype.
    """

    tensor: str
    start: int
    weight: EncodedTensor

    @property
    def spans(self) -> tuple[Span, ...]:
        """Codes, scales, and whatever else the weight consists of."""
        return self.weight.spans

    @property
    def formats(self) -> frozenset[str]:
        """The weight's format."""
        return frozenset({self.weight.format})

    @property
    def held(self) -> Mapping[str, ScaledCodes | None]:
        """The weight's codes."""
        return {self.tensor: self.weight.scaled_codes}

    @property
    def staging_bytes(self) -> int:
        """The stored tensors, and some rows in float32."""
        return self.weight.working_bytes

    def read_into(self, checkpoint: Checkpoint, tensors: Targets) -> None:
        """Decode the weight into its part of the tensor, or copy its codes."""
        one, target = self.weight, tensors[self.tensor]
        size = value_bytes(one)
        if not isinstance(target, Tensor):
            codes = one.read_codes(checkpoint.reader)
            target.fill(len(codes.codes_RB) * self.start // size, codes)
            return
        part = target.view(-1).view(torch.uint8)[self.start : self.start + size]
        one.read_into(checkpoint.reader, part.view(one.dtype).view(one.shape))

    def values(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Yield the weight as one tensor."""
        yield checkpoint.tensor(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion(ExpertSource):
    """One of the expert's tensors, made from checkpoint tensors by transformers' operations.

    Attributes:
        tensor: Short name of the tensor.
        target: Full name of the model's parameter.
        spec: Shape and dtype of the tensor.
        converter: The operations; None if the only source is used as it is.
        sources: Pairs of source pattern and the checkpoint's tensors that match it.
        config: The model's configuration, which some operations read.
    """

    tensor: str
    target: str
    spec: TensorSpec
    converter: WeightConverter | None
    sources: tuple[tuple[str, tuple[StoredTensor, ...]], ...]
    config: Any

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All source tensors."""
        return tuple(one for _, group in self.sources for one in group)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Spans of all source tensors."""
        return tuple(span for one in self.stored for span in one.spans)

    @property
    def formats(self) -> frozenset[str]:
        """Those of all source tensors."""
        return frozenset(one.format for one in self.stored)

    @property
    def held(self) -> Mapping[str, ScaledCodes | None]:
        """No codes: operations are applied to values."""
        return {self.tensor: None}

    @property
    def staging_bytes(self) -> int:
        """The source tensors, and as many bytes again for the operations' results."""
        working = max((one.working_bytes for one in self.stored), default=0)
        return 2 * sum(map(value_bytes, self.stored)) + working

    def read_into(self, checkpoint: Checkpoint, tensors: Targets) -> None:
        """Copy the converted tensor into place."""
        _tensor(tensors, self.tensor).copy_(self.materialize(checkpoint))

    def values(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Yield the converted tensor."""
        yield self.materialize(checkpoint)

    def materialize(self, checkpoint: Checkpoint) -> Tensor:
        """Return the converted tensor in the model's dtype.

        Raises:
            CheckpointError: A source tensor cannot be read or converted.
            UnsupportedModelError: The result's shape is not the one that the model uses.
        """
        return self._convert_checked(
            {key: [checkpoint.tensor(s) for s in spans] for key, spans in self.sources}
        )

    def check_shape(self) -> None:
        """Raise as `materialize` does if the source shapes lead to an error; read nothing."""
        with torch.device("meta"):
            self._convert_checked(
                {
                    key: [torch.empty(span.shape, dtype=span.dtype) for span in spans]
                    for key, spans in self.sources
                }
            )

    @property
    def shape_key(self) -> tuple[Any, ...]:
        """A key that is equal for conversions with the same operations, shapes and dtypes."""
        shapes = tuple(
            (key, tuple((span.shape, span.dtype) for span in spans)) for key, spans in self.sources
        )
        return self.tensor, self.spec, id(self.converter), shapes

    def _convert_checked(self, loaded: dict[str, list[Tensor]]) -> Tensor:
        try:
            value = self._convert(loaded) if self.converter else next(iter(loaded.values()))[0]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{self.target} cannot be made from the checkpoint's {self._source_names()}: "
                f"{in_brief(error)}; copy or download the checkpoint again"
            ) from error
        if value.shape == (1, *self.spec.shape):
            value = value[0]
        if tuple(value.shape) != self.spec.shape:
            raise UnsupportedModelError(
                f"{self.target}: one expert of the checkpoint ({self._source_names()}) becomes "
                f"{list(value.shape)}, but the model computes with {list(self.spec.shape)}; either "
                "config.json is not the one that belongs to the weights, or this family's layout "
                "cannot be read expert by expert"
            )
        return value.to(self.spec.dtype)

    def _source_names(self) -> str:
        found = self.stored
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return ", ".join(f"{one.name} {list(one.shape)}" for one in found[:3]) + more

    def _convert(self, loaded: dict[str, list[Tensor]]) -> Tensor:
        converter = deepcopy(cast(WeightConverter, self.converter))
        for pattern, tensors in loaded.items():
            converter.collected_tensors[pattern] = cast(Any, tensors)
        converted = converter.convert(
            self.target, model=_OneExpert(self.spec), config=self.config, loading_info=None
        )
        if self.target not in converted:
            raise UnsupportedModelError(
                f"{self.target}: transformers' conversion returned {sorted(converted)} instead"
            )
        value = converted[self.target]
        return value[0] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class CompositeSource(ExpertSource):
    """A source made of several, which together fill all of an expert's tensors."""

    parts: tuple[ExpertSource, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """Spans of all parts, in order."""
        return tuple(span for part in self.parts for span in part.spans)

    @property
    def formats(self) -> frozenset[str]:
        """Those of all parts."""
        return frozenset().union(*(part.formats for part in self.parts))

    @property
    def held(self) -> Mapping[str, ScaledCodes | None]:
        """Those of all parts; a tensor whose parts differ has none."""
        found: dict[str, ScaledCodes | None] = {}
        for name, codes in (item for part in self.parts for item in part.held.items()):
            found[name] = codes if found.setdefault(name, codes) == codes else None
        return found

    @property
    def staging_bytes(self) -> int:
        """Sum over the parts."""
        return sum(part.staging_bytes for part in self.parts)

    def read_into(self, checkpoint: Checkpoint, tensors: Targets) -> None:
        """Read one part after the other."""
        for part in self.parts:
            part.read_into(checkpoint, tensors)

    def values(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Yield the values of one part after the other."""
        for part in self.parts:
            yield from part.values(checkpoint)


def _tensor(tensors: Targets, name: str) -> Tensor:
    target = tensors[name]
    assert isinstance(target, Tensor), name
    return target


class _OneExpert:
    """Stand-in for the model in operations that look up a parameter's shape."""

    def __init__(self, spec: TensorSpec):
        self._spec = spec

    def get_parameter(self, name: str) -> Tensor:
        """Return a stack of one expert on the meta device."""
        return torch.empty((1, *self._spec.shape), dtype=self._spec.dtype, device="meta")
