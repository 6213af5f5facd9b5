"""Which tokens of a packed step are whose: requests' tokens behind one another, and what they see.

Owns the arithmetic of places and the masks within one request's keys. Knows nothing of models,
pools or of how attention is computed.

Shapes: T tokens, L keys of a request.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moefit.errors import UnsupportedModelError


class UnpackableError(UnsupportedModelError):
    """The family asks of attention what packing does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`new` tokens of one request, behind `past` that its places hold already.

    start: its first place, or where its keys begin among those that were gathered.
    """

    start: int
    past: int
    new: int

    @property
    def end(self) -> int:
        """Behind its last key, once the new ones are there."""
        return self.start + self.past + self.new


@dataclass(slots=True, kw_only=True)
class Segments:
    """What attention must know of a step. masks: made when first needed, the same in all layers."""

    rows: tuple[Segment, ...]
    masks: dict[tuple[Segment, int, torch.dtype], Tensor] = field(default_factory=dict)
    storages: set[int] = field(default_factory=set)  # of the keys that attention was given

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor:
        """What new tokens may not see, as minus infinity: [T, L], L from `first_key` on."""
        seen = segment.past + segment.new
        name = (segment, window or seen, like.dtype)
        if (mask := self.masks.get(name)) is None:
            query_T1 = torch.arange(segment.past, seen, device=like.device)[:, None]
            key_1L = torch.arange(first_key(segment, window), seen, device=like.device)[None]
            hidden = key_1L > query_T1
            if window is not None:
                hidden |= key_1L <= query_T1 - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.masks[name] = mask.masked_fill_(hidden, -torch.inf)
        return self.masks[name]


def first_key(segment: Segment, window: int | None) -> int:
    """The first of a request's keys that any of its new tokens sees."""
    return 0 if window is None else max(0, segment.past + 1 - window)
