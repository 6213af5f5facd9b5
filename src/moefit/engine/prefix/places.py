"""Where requests and idle blocks lie in the KV pool.

`Places` assigns each request a contiguous range, and each idle block a place outside of all ranges.
Its methods return the moves of contents that the assignment needs. Knows nothing of tokens. No
tensors or threads.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Copy `size` places from `source` to `target`; the two may overlap."""

    source: int
    target: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a block lies that a new request begins with.

    Attributes:
        place: Its first place.
        idle: Whether it is idle, so that it may be overwritten once it is copied.
    """

    place: int
    idle: bool


class Places:
    """Assign places to requests and idle blocks.

    Args:
        places: Number of places.
        block: Places per block.
    """

    def __init__(self, places: int, block: int):
        self.places, self.block = places, block
        self._ranges: dict[str, tuple[int, int]] = {}  # start and size, sorted by start
        self._blocks: dict[int, int] = {}  # idle blocks: first place by number

    @property
    def free(self) -> int:
        """Number of places outside of requests' ranges, idle blocks included."""
        return self.places - sum(size for _, size in self._ranges.values())

    def start(self, name: str) -> int:
        """Return the first place of a request's range."""
        return self._ranges[name][0]

    def size(self, name: str) -> int:
        """Return the number of places of a request's range."""
        return self._ranges[name][1]

    def place(self, number: int) -> int:
        """Return the first place of an idle block."""
        return self._blocks[number]

    def add_block(self, number: int, place: int) -> None:
        """Assign a place to an idle block, whose content is there already."""
        assert number not in self._blocks
        self._blocks[number] = place

    def remove_block(self, number: int) -> None:
        """Free the place of an idle block."""
        del self._blocks[number]

    def assign(self, name: str, start: int, size: int) -> None:
        """Assign a range to a request."""
        assert name not in self._ranges, name
        self._ranges[name] = (start, size)
        self._ranges = dict(sorted(self._ranges.items(), key=lambda item: item[1]))

    def release(self, name: str) -> None:
        """Free a request's range, if it has one."""
        self._ranges.pop(name, None)

    def window(self, size: int, sources: Sequence[Source]) -> int | None:
        """Return where a request costs the fewest copies and other idle blocks.

        Args:
            size: Places of the request.
            sources: The blocks that it begins with.

        Returns:
            The first place; None if no gap between ranges is large enough.
        """
        kept = {one.place for one in sources if one.idle}
        others = sorted(place for place in self._blocks.values() if place not in kept)
        runs = Counter(
            one.place - index * self.block for index, one in enumerate(sources) if one.idle
        )
        best: tuple[int, int, int] | None = None
        for begin, end in self._gaps():
            if end - begin < size:
                continue
            for start in self._candidates((begin, end - size), size, others, runs):
                cost = self._overlaps(start, size, others) + len(kept) - runs[start]
                lost = len(sources) - usable(start, sources, self.block)
                best = min(best or (lost, cost, start), (lost, cost, start))
        return None if best is None else best[2]

    def _candidates(
        self, bounds: tuple[int, int], size: int, others: Sequence[int], runs: Mapping[int, int]
    ) -> set[int]:
        """Return first places to choose from in a gap, as bounds of the first place."""
        low, high = bounds
        fewest = min(
            (low, *(place + self.block for place in others if low <= place + self.block <= high)),
            key=lambda start: (self._overlaps(start, size, others), start),
        )
        return {low, high, fewest, *(min(run, high) for run in runs if run >= low)}

    def _overlaps(self, start: int, size: int, others: Sequence[int]) -> int:
        """Return how many of the sorted blocks overlap a window."""
        return bisect_left(others, start + size) - bisect_right(others, start - self.block)

    def clear_window(self, start: int, size: int, numbers: Iterable[int]) -> Iterator[Move | int]:
        """Move idle blocks out of a window; yields moves, or numbers of blocks without a place.

        Args:
            start: First place of the window.
            size: Places of the window.
            numbers: Idle blocks, the first to keep first; others stay where they are.
        """
        free = self._free_places(start, size)
        for number in numbers:
            place = self._blocks.get(number)
            if place is None or not start - self.block < place < start + size:
                continue
            target = next(free, None)
            if target is None:
                yield number
            else:
                self._blocks[number] = target
                yield Move(source=place, target=target, size=self.block)

    @property
    def end(self) -> int:
        """End of what is occupied, exclusive."""
        return max((place + size for place, size, _ in self._occupied()), default=0)

    def resize(self, places: int) -> None:
        """Change the number of places; nothing may lie beyond them."""
        assert self.end <= places, f"{self.end} places are occupied"
        self.places = places

    def compact(self) -> tuple[Move, ...]:
        """Move all ranges and idle blocks to the front, without gaps between them.

        Returns:
            Moves towards the front, to be carried out in order.
        """
        moves: list[Move] = []
        end = 0
        for place, size, name in self._occupied():
            if place != end:
                moves.append(Move(source=place, target=end, size=size))
                if isinstance(name, str):
                    self._ranges[name] = (end, size)
                else:
                    self._blocks[name] = end
            end += size
        return tuple(moves)

    def check(self) -> None:
        """Raise AssertionError if ranges or blocks overlap, or exceed the pool."""
        end = 0
        for place, size, name in self._occupied():
            assert place >= end, f"{name} begins at {place}, the one before it ends at {end}"
            end = place + size
        assert end <= self.places
        starts = [start for start, _ in self._ranges.values()]
        assert starts == sorted(starts)

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield begin and end of the gaps between requests' ranges."""
        end = 0
        for start, size in (*self._ranges.values(), (self.places, 0)):
            if start > end:
                yield end, start
            end = start + size

    def _occupied(self) -> list[tuple[int, int, str | int]]:
        """Return place, size and name of all ranges and idle blocks, by place."""
        blocks = [(place, self.block, number) for number, place in self._blocks.items()]
        ranges = [(start, size, name) for name, (start, size) in self._ranges.items()]
        return sorted((*blocks, *ranges), key=lambda one: one[0])

    def _free_places(self, start: int, size: int) -> Iterator[int]:
        """Yield where blocks fit outside of a window, of ranges and of idle blocks."""
        end = 0
        occupied = sorted([*((p, s) for p, s, _ in self._occupied()), (start, size)])
        for place, width in (*occupied, (self.places, 0)):
            yield from range(end, place - self.block + 1, self.block)
            end = max(end, place + width)


def usable(start: int, sources: Sequence[Source], block: int) -> int:
    """Return how many blocks can be copied one after another to `start` and the places after it.

    A block cannot be copied if one before it is copied to its place.
    """
    idle = sorted((one.place, index) for index, one in enumerate(sources) if one.idle)
    places, limit = [place for place, _ in idle], len(sources)
    for index, one in enumerate(sources):
        if index >= limit:
            break
        target = start + index * block
        if one.place == target:
            continue
        low, high = bisect_right(places, target - block), bisect_left(places, target + block)
        later = [other for _, other in idle[low:high] if other > index]
        limit = min([limit, *later])
    return limit


def merged(moves: Iterable[Move]) -> tuple[Move, ...]:
    """Return moves with those joined that continue each other.

    >>> merged([Move(source=8, target=0, size=4), Move(source=12, target=4, size=4)])
    (Move(source=8, target=0, size=8),)
    """
    joined: list[Move] = []
    for one in moves:
        if joined and _continues(joined[-1], one):
            last = joined[-1]
            joined[-1] = Move(source=last.source, target=last.target, size=last.size + one.size)
        else:
            joined.append(one)
    return tuple(joined)


def _continues(last: Move, one: Move) -> bool:
    """Return whether two moves are one, which overwrites nothing that it has still to read."""
    if (last.source + last.size, last.target + last.size) != (one.source, one.target):
        return False
    return last.target < last.source or one.source + one.size <= last.target
