"""Where in a row of so many places each request has its own, without a gap.

Owns giving and taking back stretches of places, first fit, and what must be moved together when
there is room but no stretch long enough. Pure: knows nothing of keys and values.
"""

from dataclasses import dataclass


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
