"""An expert on its way into a slot of a table.

Owns how that ends: the slot is published or abandoned, and the waiting is counted. Knows nothing of
which expert it is, nor of why it comes.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

from moefit.serve.counters import Counters
from moefit.serve.residency import Residency
from moefit.serve.transfer import finish


@dataclass(frozen=True, slots=True)
class Coming:
    """A read into slot `slot`, reserved in the table."""

    slot: int
    done: Future[float]

    def arrive(self, table: Residency, counters: Counters) -> None:
        """Wait for the read; raises what it raised, and nobody is in the slot then."""
        began = perf_counter()
        try:
            finish(self.done)
        except BaseException:
            table.abandon(self.slot)
            raise
        finally:
            counters.wait_seconds += perf_counter() - began
        table.publish(self.slot)
