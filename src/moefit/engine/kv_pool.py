"""Keys and values of requests in one preallocated pool.

Beside them lie a token's router logits, for models that route by those of the token before.
`KvPool` holds the tensors and moves their contents; `PrefixCache` decides which request lies where,
and which keys and values of earlier ones stay. A pool of another size is copied tensor by tensor,
so that beside the larger of the two sizes only one tensor exists twice. In host memory each tensor
is a mapping of its own, because memory freed to the C library's heap need not return to the system.

Shapes: G key-value heads, P places of the pool (one token each), R new tokens, C head width, E
experts.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from moefit.engine.prefix.cache import PrefixCache
from moefit.engine.prefix.places import Move
from moefit.engine.prefix.tree import Prefix
from moefit.quant.kv_int8 import Int8Rows
from moefit.serve.cache.slot import host_bytes

_MOVE_TOKENS = 256  # tokens copied at a time, to bound the extra memory


class KvPool:
    """KV cache of `places` tokens: keys and values [G, P, C] of each layer.

    Args:
        places: Number of tokens.
        int8: Hold keys and values as `Int8Rows` instead of in the model's dtype.
    """

    def __init__(self, places: int, *, int8: bool = False):
        self.places, self.int8 = PrefixCache(places), int8
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._logits: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Size of all layers in bytes; 0 before the first step."""
        return sum(one.nbytes for one in self._tensors())

    def open(self, name: str, size: int, prefix: Prefix | None = None) -> int:
        """Reserve places for a request; moves others if the free space is fragmented.

        Args:
            name: Request id.
            size: Number of tokens.
            prefix: See `PrefixCache.open`.

        Returns:
            The number of tokens at the start of the prompt whose keys and values are there.
        """
        opened = self.places.open(name, size, prefix)
        self._move(opened.moves)
        return opened.cached

    def join(self, name: str, prefix: Prefix) -> int:
        """Copy what others have computed of a request's prompt since it was opened, as `open`."""
        joined = self.places.join(name, prefix)
        self._move(joined.moves)
        return joined.cached

    def resize(self, places: int) -> None:
        """Change the number of places, at least those that running requests have reserved.

        Args:
            places: Number of tokens.

        Raises:
            OSError: There is no memory. A pool that was to grow has the places of before; one that
                was to shrink has fewer. Some tensors may be larger than that: see `held`. Calling
                this again with the places that there are makes them smaller.
        """
        before = self.places.places
        if places < before:
            self._move(self.places.resize(places))
        try:
            self._resize_tensors(min(before, places), places)
        except OSError:
            if places > before:
                with suppress(OSError):
                    self._resize_tensors(before, before)
            raise
        if places > before:
            self.places.resize(places)

    def layer(self, index: int, key_1GRC: Tensor, value_1GRC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [G, P, C] of a layer, creating them on first use.

        Args:
            index: Layer index.
            key_1GRC: New keys, which determine shape, dtype and device.
            value_1GRC: New values, likewise.
        """
        if (pair := self._layers.get(index)) is None:
            pair = self._allocated(key_1GRC), self._allocated(value_1GRC)
            self._layers[index] = pair
        return pair

    def logits(self, block: int, like_RE: Tensor) -> Tensor:
        """Return the router logits [P, E] of a block, creating them on first use; never int8.

        Args:
            block: Index of the block.
            like_RE: New logits, which determine shape, dtype and device.
        """
        if (held := self._logits.get(block)) is None:
            with torch.inference_mode(False):  # an inference tensor is read-only elsewhere
                shape = 1, self.places.places, like_RE.shape[1]
                held = _zeros(shape, like_RE.dtype, like_RE.device)
            self._logits[block] = held
        return held[0]

    def known_logits(self, block: int) -> Tensor | None:
        """Return the router logits [P, E] of a block; None before its first use."""
        held = self._logits.get(block)
        return None if held is None else held[0]

    def known(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return keys and values [G, P, C] of a layer; None before its first use."""
        return self._layers.get(index)

    def storages(self) -> frozenset[int]:
        """Return the addresses of all storages, to recognise views of them."""
        return frozenset(one.untyped_storage().data_ptr() for one in self._tensors())

    @property
    def bytes_per_place(self) -> int:
        """Bytes of a token in all layers."""
        return sum(one.nbytes // one.shape[1] for one in self._tensors())

    @property
    def held(self) -> int:
        """Places of the largest tensor: more than are used after a change that lacked memory."""
        return max([self.places.places, *(one.shape[1] for one in self._tensors())])

    def layout(self) -> str:
        """Return a text that is the same for pools whose places hold the same bytes."""
        shapes = [
            (index, [(str(one.dtype), one.shape[0], *one.shape[2:]) for one in _tensors(pair)])
            for index, pair in sorted(self._layers.items())
        ]
        logits = [(block, one.shape[2]) for block, one in sorted(self._logits.items())]
        return repr(shapes) + (repr(logits) if logits else "")

    def copy_out(self, blocks: Sequence[int]) -> bytearray:
        """Return the content of blocks, by their first places."""
        size, content = self.places.block, bytearray()
        for one in self._tensors():
            parts = [one[:, start : start + size] for start in blocks]
            content += _bytes_of(torch.cat(parts, dim=1))
        return content

    def copy_in(self, start: int, content: bytearray) -> None:
        """Set the content of consecutive places, from `start` on, as `copy_out` returned it."""
        tokens, begin = len(content) // self.bytes_per_place, 0
        for one in self._tensors():
            target = one[:, start : start + tokens]
            flat = torch.frombuffer(content, dtype=one.dtype, count=target.numel(), offset=begin)
            target.copy_(flat.view(target.shape))
            begin += target.nbytes
        assert begin == len(content)

    def check(self) -> None:
        """Raise AssertionError if ranges overlap or layers differ in size."""
        self.places.check()
        assert all(one.shape[1] >= self.places.places for one in self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Return everything that is held per place, in a fixed order; dimension 1 is of places."""
        pairs = [self._layers[index] for index in sorted(self._layers)]
        logits = [self._logits[block] for block in sorted(self._logits)]
        return logits + [one for pair in pairs for one in _tensors(pair)]

    def _allocated(self, like: Tensor) -> Tensor:
        shape = like.shape[1], self.places.places, like.shape[3]
        with torch.inference_mode(False):  # an inference tensor is read-only elsewhere
            if self.int8:
                codes = _zeros(shape, torch.int8, like.device)
                return Int8Rows.of(codes, _zeros(shape[:2], torch.float32, like.device))
            return _zeros(shape, like.dtype, like.device)

    def _resize_tensors(self, kept: int, places: int) -> None:
        """Copy the first `kept` places into tensors of `places`, one tensor after another."""
        for index in sorted(self._layers):
            for side in (0, 1):
                pair = list(self._layers[index])
                pair[side] = _resized(pair[side], kept, places)
                self._layers[index] = (pair[0], pair[1])
        for block in sorted(self._logits):
            self._logits[block] = _resized(self._logits[block], kept, places)

    def _move(self, moves: Iterable[Move]) -> None:
        """Copy in chunks, reading parts that overlap before they are overwritten."""
        for move in moves:
            for one in self._tensors():
                _copy(one, move)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; raises OSError if there is no host memory."""
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    return host_bytes(size).view(dtype).view(tuple(shape))


@torch.inference_mode(False)
def _resized(rows: Tensor, kept: int, places: int) -> Tensor:
    """Return what a tensor holds in `places` places, of which the first `kept` are copied."""
    if rows.shape[1] == places:
        return rows
    tensors: list[Tensor] = []
    for one in (rows.codes(), rows.scales) if isinstance(rows, Int8Rows) else (rows,):
        made = _zeros((one.shape[0], places, *one.shape[2:]), one.dtype, one.device)
        made[:, :kept] = one[:, :kept]
        tensors.append(made)
    return Int8Rows.of(tensors[0], tensors[1]) if isinstance(rows, Int8Rows) else tensors[0]


def _copy(places_GP: Tensor, move: Move) -> None:
    for begin in range(0, move.size, _MOVE_TOKENS):
        size = min(_MOVE_TOKENS, move.size - begin)
        source, target = move.source + begin, move.target + begin
        chunk = places_GP[:, source : source + size]
        apart = abs(move.source - move.target) >= size
        places_GP[:, target : target + size] = chunk if apart else chunk.clone()


def _bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's bytes, in any dtype."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _tensors(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return a layer's contents as plain tensors, whose second dimension is that of places."""
    return [
        tensor
        for one in pair
        for tensor in ((one.codes(), one.scales) if isinstance(one, Int8Rows) else (one,))
    ]
