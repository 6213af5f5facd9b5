"""What one expert of a layer costs on each side: a device behind a link, and where it lies.

The far side is the host's CPU or a processor near the memory. A cold expert is computed there, and
its tokens travel; a hot one travels to the device and is computed there. Plain Python.
"""

from dataclasses import dataclass, fields
from math import isfinite

from moefit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds (or any other unit) that experts take on each side.

    Attributes:
        load: Of one expert over the link.
        gpu: Of an expert on the device: fixed, and per token.
        far: Of an expert on the far side: fixed, and per token.
        far_read: Part of an expert's fixed time on the far side that reads its weights; copies over
            a shared memory slow it down.
        activations: Of one token's activations, there and back.
        shared: Share of the far side's bandwidth that a copy over the link takes, 0 to less than 1.
        between: Of a layer beyond its experts, in which the link is idle.
        start: Of a layer in which the far side computes anything: waking it, and moving tensors.
    """

    load: float
    gpu: tuple[float, float]
    far: tuple[float, float]
    far_read: float = 0.0
    activations: float = 0.0
    shared: float = 0.0
    between: float = 0.0
    start: float = 0.0

    def on_gpu(self, tokens: int) -> float:
        """Return the time of an expert on the device."""
        return max(self.gpu[0], self.gpu[1] * tokens)

    def on_far_side(self, tokens: int) -> float:
        """Return the time of an expert where it lies."""
        return max(self.far[0], self.far[1] * tokens)

    def check(self) -> None:
        """Raise ConfigError if a time is negative or not finite, such as at a bandwidth of zero."""
        for one in fields(self):
            value = getattr(self, one.name)
            times = value if isinstance(value, tuple) else (value,)
            if not all(isfinite(time) and time >= 0 for time in times):
                raise ConfigError(
                    f"the cost {one.name!r} of an expert is {value!r} seconds, as over a link "
                    "without bandwidth; it must be finite and at least 0: give bandwidths above "
                    "zero, or fetch all experts (--host-compute fetch-all)"
                )
        if not self.shared < 1:
            raise ConfigError(
                f"copies take {self.shared!r} of the far side's bandwidth, but it must be below 1"
            )
