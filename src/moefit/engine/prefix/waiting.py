"""Requests that wait for another one that is computing the same prefix.

Requests that arrive together, such as the choices of one prompt or an agent's parallel calls, would
each compute their common prefix. Instead one computes it, and the others wait until it has, which
is no later than if they had shared the steps. Pure decisions, without tensors or threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moefit.engine.prefix.tree import Prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A request whose prompt is being computed.

    Attributes:
        name: Request id.
        prefix: Its prompt.
        computed: Tokens of it that are computed.
    """

    name: str
    prefix: Prefix
    computed: int


class WaitingForPrefix:
    """Which requests wait, for which others, and for how many tokens.

    Args:
        block: Tokens per block; less than one more is not waited for.
    """

    def __init__(self, block: int):
        self._block = block
        self._waits: dict[str, tuple[str, int]] = {}  # for which other, until so many are computed

    def __contains__(self, name: str) -> bool:
        """Return whether a request waits."""
        return name in self._waits

    def begin(self, name: str, prefix: Prefix, cached: int, others: Sequence[Reading]) -> bool:
        """Return whether a new request has to wait, for the one with the longest common prefix.

        Args:
            name: Request id.
            prefix: Its prompt, of which at least one token is left to compute.
            cached: Tokens whose keys and values it has.
            others: Requests whose prompt is being computed, without those that wait.
        """
        best = max(
            ((self._common(prefix, other), other) for other in others),
            key=lambda one: one[0],
            default=None,
        )
        if best is None or best[0] <= max(cached, best[1].computed):
            return False
        self._waits[name] = (best[1].name, best[0])
        return True

    def computed(self, name: str, tokens: int) -> list[str]:
        """Return the requests that wait no longer once `tokens` of `name` are computed."""
        return self._end(
            [w for w, (other, until) in self._waits.items() if other == name and until <= tokens]
        )

    def ended(self, name: str) -> list[str]:
        """Return the requests that wait no longer since `name` has ended."""
        self._waits.pop(name, None)
        return self._end([waits for waits, (other, _) in self._waits.items() if other == name])

    def check(self) -> None:
        """Raise AssertionError if a request waits for one that waits."""
        for name, (other, until) in self._waits.items():
            assert other not in self._waits, f"{name} waits for {other}, which waits"
            assert until > 0 and until % self._block == 0

    def _end(self, names: list[str]) -> list[str]:
        for name in names:
            del self._waits[name]
        return names

    def _common(self, prefix: Prefix, other: Reading) -> int:
        """Return the tokens of whole blocks that two prompts begin with."""
        if prefix.namespace != other.prefix.namespace:
            return 0
        most = min(len(prefix.tokens) - 1, len(other.prefix.tokens))
        same = 0
        while same + self._block <= most:
            part = slice(same, same + self._block)
            if tuple(prefix.tokens[part]) != tuple(other.prefix.tokens[part]):
                break
            same += self._block
        return same
