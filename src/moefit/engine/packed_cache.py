"""The pool of keys and values as a model's cache during one packed step.

Owns writing a step's keys and values to each request's places, and what the model is given for
them. Knows nothing of masks or of attention.

Shapes: G KV heads, P places of the pool, R new tokens, N keys that were gathered, C head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moefit.engine.pool import KvPool
from moefit.engine.segments import Segment, Segments, UnpackableError


class PackedCache(Cache):
    """The pool, as a model sees it during one step.

    gathers: give the model a step's keys and values side by side instead of the pool itself; for
    families that go on computing with them before they attend (latent attention).
    """

    def __init__(self, pool: KvPool):
        super().__init__(layers=[])
        self.pool, self.gathers = pool, False
        self._segments: tuple[Segment, ...] = ()
        self._places_R = self._gathered_N = torch.empty(0, dtype=torch.long)
        self._held = 0

    def begin(self, segments: Sequence[Segment], held: int, device: torch.device) -> Segments:
        """The next step reads these, places of the pool. held: tokens of all requests after it."""
        self._segments, self._held = tuple(segments), held
        places = [p for one in segments for p in range(one.start + one.past, one.end)]
        self._places_R = torch.tensor(places, device=device)
        if not self.gathers:
            return Segments(rows=self._segments)
        keys = [p for one in segments for p in range(one.start, one.end)]
        self._gathered_N = torch.tensor(keys, device=device)
        rows, start = [], 0
        for one in segments:
            rows.append(Segment(start=start, past=one.past, new=one.new))
            start = rows[-1].end
        return Segments(rows=tuple(rows))

    def tokens_held(self) -> int:
        """Of all requests, this step's included."""
        return self._held

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values to their places; gives all that attention needs."""
        pair = self.pool.layer(layer_idx, key_states, value_states)
        for pool_GPC, new in zip(pair, (key_states, value_states), strict=True):
            new_GRC = new[0] if new.shape[0] == 1 else new[:, :, 0].transpose(0, 1)
            if len(self._places_R) == 1:
                pool_GPC[:, self._segments[0].end - 1] = new_GRC[:, 0]
            else:
                pool_GPC.index_copy_(1, self._places_R, new_GRC)
        if not self.gathers:
            return pair[0][None], pair[1][None]
        if len(self._segments) == 1:
            one = self._segments[0]
            return pair[0][None, :, one.start : one.end], pair[1][None, :, one.start : one.end]
        key, value = (one.index_select(1, self._gathered_N)[None] for one in pair)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Raise UnpackableError: requests differ in it, and positions are given with the tokens."""
        raise UnpackableError("it counts positions by the cache's length")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of no use to a mask that is said, not written."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of no use either."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Places of the pool."""
        return self.pool.extents.places
