"""What all blocks of a served model share.

Owns the record of it: the policy in force, who plans swaps, the transfer, counters, spare slots,
better copies, and the lock that a step holds. Knows nothing of what any of them is used for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock

from moefit.serve.better_copies import BetterCopies
from moefit.serve.counters import Counters
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.policy import Policy
from moefit.serve.slots import Slot
from moefit.serve.transfer import Transfer

Spares = dict[tuple[str, int], list[Slot]]
"""Slots for swaps, by format and size: experts of all blocks with such slots take turns."""


@dataclass(slots=True)
class Live:
    """Changed between steps, under `lock`; the objects behind the names stay, but for two.

    `policy` and `manager` are replaced as a whole, so they are asked for at every step.
    """

    policy: Policy
    manager: VirtualExpertManager
    transfer: Transfer
    counters: Counters = field(default_factory=Counters)
    lock: RLock = field(default_factory=RLock)
    spares: Spares = field(default_factory=dict)
    copies: BetterCopies | None = None  # None: no room is reserved for any
    each_step: Callable[[], None] | None = None  # at the first block's step borders

    @property
    def spare_bytes(self) -> int:
        """Bytes of all spare slots that no swap has taken."""
        return sum(slot.nbytes for spares in self.spares.values() for slot in spares)
