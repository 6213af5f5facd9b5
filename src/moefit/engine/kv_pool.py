"""Keys and values of all running requests in one preallocated pool.

`Extents` decides where each request's tokens lie, as contiguous ranges without gaps, in plain
Python; `KvPool` holds the tensors and carries out the moves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The places from `source` on become those from `target` on, which may overlap them."""

    name: str
    source: int
    target: int


class Extents:
    """Stretches of `places` places, by name."""

    def __init__(self, places: int):
        self.places = places
        self._starts: dict[str, int] = {}  # in order of place
        self._sizes: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self.places - sum(self._sizes.values())

    def start(self, name: str) -> int:
        """Its first place."""
        return self._starts[name]

    def size(self, name: str) -> int:
        """How many places it has."""
        return self._sizes[name]

    def take(self, name: str, size: int) -> tuple[Move, ...]:
        """Give `name` so many places; before they are used, the moves must be made, in order.

        `size` is at most `free`.
        """
        assert name not in self._sizes, name
        assert 0 < size <= self.free, f"{size} of {self.free} free places"
        moves: tuple[Move, ...] = ()
        if (start := self._hole(size)) is None:
            moves = self._closed_up()
            start = self.places - self.free
        self._starts[name], self._sizes[name] = start, size
        self._starts = dict(sorted(self._starts.items(), key=lambda item: item[1]))
        return moves

    def give_back(self, name: str) -> None:
        """Its places, if it has any, are free again."""
        self._starts.pop(name, None)
        self._sizes.pop(name, None)

    def check(self) -> None:
        """Raise AssertionError if two share a place, or one lies outside."""
        assert self._starts.keys() == self._sizes.keys()
        end = 0
        for name, start in self._starts.items():
            assert start >= end, f"{name} begins at {start}, the one before it ends at {end}"
            end = start + self._sizes[name]
        assert end <= self.places

    def _hole(self, size: int) -> int | None:
        end = 0
        for name, start in self._starts.items():
            if start - end >= size:
                return end
            end = start + self._sizes[name]
        return end if self.places - end >= size else None

    def _closed_up(self) -> tuple[Move, ...]:
        """Let all stretches lie side by side from the first place on."""
        moves, end = [], 0
        for name, start in self._starts.items():
            if start != end:
                moves.append(Move(name=name, source=start, target=end))
                self._starts[name] = end
            end += self._sizes[name]
        return tuple(moves)


_AT_ONCE = 256  # tokens that closing up copies at a time, beside the pool


class KvPool:
    """As many places as tokens may be held; what lies there is layer by layer [G, P, C]."""

    def __init__(self, places: int):
        self.extents = Extents(places)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; nothing before the first step."""
        return sum(one.nbytes for pair in self._layers.values() for one in pair)

    def take(self, name: str, size: int) -> None:
        """Give a request its places; others may be moved together to make room."""
        for move in self.extents.take(name, size):
            self._move(move)

    def give_back(self, name: str) -> None:
        """A request's places are free again."""
        self.extents.give_back(name)

    def layer(self, index: int, key_1GRC: Tensor, value_1GRC: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [G, P, C]; the first time they are made, like the given ones.

        What is not written yet is zero.
        """
        if (pair := self._layers.get(index)) is None:
            pair = self._made(key_1GRC), self._made(value_1GRC)
            self._layers[index] = pair
        return pair

    def storages(self) -> frozenset[int]:
        """Where the layers' keys and values begin in memory, to know a view of them again."""
        return frozenset(
            one.untyped_storage().data_ptr() for pair in self._layers.values() for one in pair
        )

    def check(self) -> None:
        """Raise AssertionError if requests share places or layers differ in them."""
        self.extents.check()
        for pair in self._layers.values():
            assert all(one.shape[1] == self.extents.places for one in pair)

    def _made(self, like: Tensor) -> Tensor:
        with torch.inference_mode(False):  # else it could be written to in that mode only
            shape = like.shape[1], self.extents.places, like.shape[3]
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _move(self, move: Move) -> None:
        """Towards the front, a part at a time, so that what overlaps is read before it is lost."""
        size, shift = self.extents.size(move.name), move.source - move.target
        for pair in self._layers.values():
            for one in pair:
                for begin in range(move.target, move.target + size, _AT_ONCE):
                    end = min(begin + _AT_ONCE, move.target + size)
                    one[:, begin:end] = one[:, begin + shift : end + shift].clone()
