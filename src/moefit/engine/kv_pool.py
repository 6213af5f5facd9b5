"""Keys and values of all running requests in one preallocated pool.

`Extents` assigns each request a contiguous range of the pool, in plain Python; `KvPool` holds the
tensors and moves their contents.

Shapes: G key-value heads, P places of the pool (one token each), R new tokens, C head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefit.quant.kv_int8 import Int8Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Copy a request's range from `source` to `target`; the two may overlap."""

    name: str
    source: int
    target: int


class Extents:
    """Assign contiguous ranges of `places` places to names."""

    def __init__(self, places: int):
        self.places = places
        self._starts: dict[str, int] = {}  # sorted by first place
        self._sizes: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Number of unassigned places."""
        return self.places - sum(self._sizes.values())

    def start(self, name: str) -> int:
        """Return the first place of a range."""
        return self._starts[name]

    def size(self, name: str) -> int:
        """Return the number of places of a range."""
        return self._sizes[name]

    def allocate(self, name: str, size: int) -> tuple[Move, ...]:
        """Assign `size` places to a name.

        Args:
            name: Owner of the range.
            size: Number of places, at most `free`.

        Returns:
            Moves to carry out, in order, before the range is used.
        """
        assert name not in self._sizes, name
        assert 0 < size <= self.free, f"{size} of {self.free} free places"
        moves: tuple[Move, ...] = ()
        if (start := self._find_gap(size)) is None:
            moves = self._compact()
            start = self.places - self.free
        self._starts[name], self._sizes[name] = start, size
        self._starts = dict(sorted(self._starts.items(), key=lambda item: item[1]))
        return moves

    def release(self, name: str) -> None:
        """Free a name's range, if it has one."""
        self._starts.pop(name, None)
        self._sizes.pop(name, None)

    def check(self) -> None:
        """Raise AssertionError if ranges overlap or exceed the pool."""
        assert self._starts.keys() == self._sizes.keys()
        end = 0
        for name, start in self._starts.items():
            assert start >= end, f"{name} begins at {start}, the one before it ends at {end}"
            end = start + self._sizes[name]
        assert end <= self.places

    def _find_gap(self, size: int) -> int | None:
        end = 0
        for name, start in self._starts.items():
            if start - end >= size:
                return end
            end = start + self._sizes[name]
        return end if self.places - end >= size else None

    def _compact(self) -> tuple[Move, ...]:
        """Move all ranges to the front, without gaps between them."""
        moves, end = [], 0
        for name, start in self._starts.items():
            if start != end:
                moves.append(Move(name=name, source=start, target=end))
                self._starts[name] = end
            end += self._sizes[name]
        return tuple(moves)


_MOVE_TOKENS = 256  # tokens copied at a time, to bound the extra memory


class KvPool:
    """KV cache of `places` tokens: keys and values [G, P, C] of each layer.

    Args:
        places: Number of tokens.
        int8: Hold keys and values as `Int8Rows` instead of in the model's dtype.
    """

    def __init__(self, places: int, *, int8: bool = False):
        self.extents, self.int8 = Extents(places), int8
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Size of all layers in bytes; 0 before the first step."""
        return sum(one.nbytes for pair in self._layers.values() for one in _tensors(pair))

    def allocate(self, name: str, size: int) -> None:
        """Reserve places for a request; moves other requests if the free space is fragmented."""
        for move in self.extents.allocate(name, size):
            self._move(move)

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

    def known(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return keys and values [G, P, C] of a layer; None before its first use."""
        return self._layers.get(index)

    def storages(self) -> frozenset[int]:
        """Return the addresses of all storages, to recognise views of them."""
        return frozenset(
            one.untyped_storage().data_ptr()
            for pair in self._layers.values()
            for one in _tensors(pair)
        )

    def check(self) -> None:
        """Raise AssertionError if ranges overlap or layers differ in size."""
        self.extents.check()
        for pair in self._layers.values():
            assert all(one.shape[1] == self.extents.places for one in pair)

    def _allocated(self, like: Tensor) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor is read-only elsewhere
            shape = like.shape[1], self.extents.places, like.shape[3]
            if self.int8:
                return Int8Rows.zeros(*shape)
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _move(self, move: Move) -> None:
        """Copy towards the front in chunks, reading overlapping parts before overwriting them."""
        size, shift = self.extents.size(move.name), move.source - move.target
        for pair in self._layers.values():
            for one in _tensors(pair):
                for begin in range(move.target, move.target + size, _MOVE_TOKENS):
                    end = min(begin + _MOVE_TOKENS, move.target + size)
                    one[:, begin:end] = one[:, begin + shift : end + shift].clone()


def _tensors(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return a layer's contents as plain tensors, whose second dimension is that of places."""
    return [
        tensor
        for one in pair
        for tensor in ((one.codes(), one.scales) if isinstance(one, Int8Rows) else (one,))
    ]
