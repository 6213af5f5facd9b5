"""What makes up one expert: bytes of a checkpoint's files, as they are or to be converted.

Owns the two ways in which a tensor of an expert comes about: byte ranges that can be read straight
into place (`Piece`), and transformers' own operations over the expert's own tensors (`Recipe`).
Knows nothing of how these are found (`expert_map.py`), nor of where they are read to.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from moefit.checkpoint.safetensors import Checkpoint, Span
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief
from moefit.moe.families import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Bytes of a file that belong, as they are, at `start` of one of the expert's tensors."""

    tensor: str
    start: int
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One of the expert's tensors as transformers' operations make it from checkpoint tensors."""

    tensor: str
    target: str
    spec: TensorSpec
    converter: WeightConverter | None
    sources: tuple[tuple[str, tuple[Span, ...]], ...]
    config: Any

    def materialize(self, checkpoint: Checkpoint) -> Tensor:
        """The tensor, in the model's dtype; its sources are in memory only meanwhile.

        Raises CheckpointError if it cannot be read, UnsupportedModelError if what transformers
        makes of it is not what the model computes with.
        """
        return self._made(
            {key: [checkpoint.tensor(s) for s in spans] for key, spans in self.sources}
        )

    def refuse_other_shape(self) -> None:
        """Raise as `materialize` does for what the sources' shapes lead to; read nothing."""
        with torch.device("meta"):
            self._made(
                {
                    key: [torch.empty(span.shape, dtype=span.dtype) for span in spans]
                    for key, spans in self.sources
                }
            )

    @property
    def likeness(self) -> tuple[Any, ...]:
        """Equal for recipes whose sources differ in nothing but their bytes."""
        shapes = tuple(
            (key, tuple((span.shape, span.dtype) for span in spans)) for key, spans in self.sources
        )
        return self.tensor, self.spec, id(self.converter), shapes

    def _made(self, loaded: dict[str, list[Tensor]]) -> Tensor:
        try:
            made = self._converted(loaded) if self.converter else next(iter(loaded.values()))[0]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{self.target} cannot be made of the checkpoint's {self._described()}: "
                f"{in_brief(error)}; copy or download it again"
            ) from error
        if made.shape == (1, *self.spec.shape):
            made = made[0]
        if tuple(made.shape) != self.spec.shape:
            raise UnsupportedModelError(
                f"{self.target}: one expert of the checkpoint ({self._described()}) becomes "
                f"{list(made.shape)}, but the model computes with {list(self.spec.shape)}; either "
                "config.json is not the one that belongs to the weights, or this family's layout "
                "cannot be read expert by expert"
            )
        return made.to(self.spec.dtype)

    def _described(self) -> str:
        spans = self.spans
        more = f" and {len(spans) - 3} more" if len(spans) > 3 else ""
        return ", ".join(f"{span.name} {list(span.shape)}" for span in spans[:3]) + more

    def _converted(self, loaded: dict[str, list[Tensor]]) -> Tensor:
        converter = deepcopy(cast(WeightConverter, self.converter))
        for pattern, tensors in loaded.items():
            converter.collected_tensors[pattern] = cast(Any, tensors)
        made = converter.convert(
            self.target, model=_OneExpert(self.spec), config=self.config, loading_info=None
        )
        if self.target not in made:
            raise UnsupportedModelError(f"{self.target}: transformers makes {sorted(made)} of it")
        value = made[self.target]
        return value[0] if isinstance(value, list) else value

    @property
    def spans(self) -> tuple[Span, ...]:
        """All that is read for it."""
        return tuple(span for _, spans in self.sources for span in spans)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(span.nbytes for span in self.spans)


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """All that makes up one expert."""

    parts: tuple[ByteRange | Conversion, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(
            part.span.nbytes if isinstance(part, ByteRange) else part.nbytes for part in self.parts
        )


class _OneExpert:
    """Stands for the model where an operation asks for a parameter's shape."""

    def __init__(self, spec: TensorSpec):
        self._spec = spec

    def get_parameter(self, name: str) -> Tensor:
        """A stack of one expert, on the meta device."""
        return torch.empty((1, *self._spec.shape), dtype=self._spec.dtype, device="meta")
