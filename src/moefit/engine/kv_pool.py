"""Keys and values of all running requests, in memory that is asked for once.

Owns one tensor of keys and one of values per layer, of just the tokens that the ledger reserved,
and where in them each request's are (`extents.py`). Knows nothing of attention.

Shapes: G heads of keys, P places (tokens), C width of a head, R rows that a step adds.
"""

import torch
from torch import Tensor

from moefit.engine.extents import Extents, Move

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
