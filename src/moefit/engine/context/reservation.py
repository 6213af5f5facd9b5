"""How many tokens an engine's KV cache should hold.

It grows as soon as requests need more than it holds, by at least a quarter, and gives back what has
not been needed for a minute, down to what is reserved from the start. Plain Python.
"""

GIVE_BACK_AFTER = 60.0  # seconds for which tokens were not needed
LEAST_GROWTH = 4  # of the present size, the part by which it grows at least
IN_USE = 3 / 4  # of the present size, the part from which on all of it counts as needed
_GRAIN = 16  # tokens: sizes are multiples of it, as blocks of prefixes are
_AGAIN = 1.0  # seconds until one looks again whether tokens are needed


class ReservationRule:
    """When to change the size of the KV cache, and to what.

    Args:
        base: Tokens that are reserved from the start.
    """

    def __init__(self, base: int):
        self.base = base
        self._unused_since: float | None = None
        self._needed = 0  # the most since then

    def next(self, now: float, *, present: int, needed: int, most: int) -> int | None:
        """Return the number of tokens to change to; None to leave it.

        Args:
            now: Time in seconds, of a clock that never goes back.
            present: Tokens that the cache holds.
            needed: Tokens of requests that run, or could if there were room.
            most: Tokens that it may hold; less than `present` if that was more before.
        """
        if needed > present:
            self._unused_since = None
            grown = min(_whole(max(needed, present + present // LEAST_GROWTH)), most)
            return grown if grown >= needed else None
        if present <= self.base or needed > IN_USE * present:
            self._unused_since = None
            return None
        if self._unused_since is None:
            self._unused_since, self._needed = now, needed
        self._needed = max(self._needed, needed)
        if now - self._unused_since < GIVE_BACK_AFTER:
            return None
        self._unused_since = None
        return self.least(present, self._needed)

    def least(self, present: int, needed: int) -> int | None:
        """Return the fewest tokens with which `needed` fit; None if that changes nothing."""
        fewest = max(self.base, _whole(needed))
        return fewest if fewest < present else None

    def wait(self, now: float, present: int) -> float | None:
        """Return the seconds after which to ask again if nothing happens; None for any time."""
        if present <= self.base:
            return None
        if self._unused_since is None:
            return _AGAIN
        return max(0.0, self._unused_since + GIVE_BACK_AFTER - now)


def _whole(tokens: int) -> int:
    return -(-tokens // _GRAIN) * _GRAIN
