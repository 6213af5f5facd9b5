"""A plan: the chosen configuration, what it was made for, and what was predicted.

`Target` is what a plan must satisfy beside its budget (a maximum loss, a minimum speed), and
`PlanChooser` picks the point of a front that satisfies it. A plan file loads a model by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefit.errors import ConfigError
from moefit.plan.configuration import Configuration, configuration_from
from moefit.plan.profile import RecordKind
from moefit.plan.search import Point
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.packed.store import fingerprint

DEFAULT_LOSS = 0.02  # what is promised where nobody asks for anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """At most this loss of perplexity, or at least this many tokens a second; both None: neither.

    Without either, the fastest whose loss is at most `DEFAULT_LOSS` is wanted, or else the best.
    """

    max_loss: float | None = None
    min_speed: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return not (self.max_loss is self.min_speed is None)

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be promised."""
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise ConfigError(f"max-loss {self.max_loss!r}, but it is a share, such as 3% or 0.03")
        if self.min_speed is not None and not 0 < self.min_speed < math.inf:
            raise ConfigError(f"min-speed {self.min_speed!r}, but it is tokens a second, above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChooser:
    """margin: what a predicted loss may be short by; tolerance: a share of time, likewise."""

    margin: float
    tolerance: float

    def choose(self, front: Sequence[Point], target: Target, memory: int) -> Point:
        """The point of a front that keeps the promise best.

        Raises ConfigError if none does, with the nearest that can be promised.
        """
        target.check()
        if not (good := [one for one in front if self.satisfies(one, target)]):
            raise ConfigError(self._nearest(front, target, memory))
        if target.min_speed is not None:
            return min(good, key=lambda one: (one.loss, one.seconds))
        if target.max_loss is None:
            good = [one for one in front if one.loss <= DEFAULT_LOSS]
        return self._best_of_fastest(good) if good else min(front, key=lambda one: one.loss)

    def satisfies(self, point: Point, target: Target) -> bool:
        """Whether this point may be promised to be so good and so fast."""
        return (target.max_loss is None or self._at_most(point) <= target.max_loss) and (
            target.min_speed is None or point.speed >= target.min_speed
        )

    def _best_of_fastest(self, points: Sequence[Point]) -> Point:
        """The best of those that predictions can't tell from the fastest."""
        fastest = min(one.seconds for one in points)
        near = [one for one in points if one.seconds <= fastest * (1 + self.tolerance)]
        return min(near, key=lambda one: (one.loss, one.seconds))

    def _at_most(self, point: Point) -> float:
        """The loss that can be promised; nothing is added where nothing is lost."""
        return point.loss + min(self.margin, max(0.0, point.loss))

    def _nearest(self, front: Sequence[Point], target: Target, memory: int) -> str:
        best, fastest = min(front, key=lambda p: p.loss), min(front, key=lambda p: p.seconds)
        given: list[str] = []
        if target.max_loss is not None:
            given.append(f"a loss of at most {target.max_loss:.2%}")
        if target.min_speed is not None:
            given.append(f"at least {target.min_speed:g} tokens/s")
        loss = math.ceil(1e4 * self._at_most(best)) / 1e4  # what is said can be asked for
        return (
            f"{' and '.join(given)} cannot be promised in {format_bytes(memory)}; there, the best "
            f"loses {loss:.2%} at {_down(best.speed):.2f} tokens/s, and the fastest makes "
            f"{_down(fastest.speed):.2f} tokens/s at a loss of {fastest.loss:.2%}"
        )


def _down(speed: float) -> float:
    return math.floor(100 * speed) / 100


VERSION = 1
_AGAIN = "make it again with moefit plan ... --save FILE"
_PLAN = RecordKind(
    name="plan",
    version=VERSION,
    version_at=("version",),
    make=_AGAIN,
    again=_AGAIN,
    elsewhere="name a file in a folder that can be written to",
    indent=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Loss of perplexity against the full model, tokens a second of one sequence, and why.

    margin: half of the held-out predictions of loss were nearer than this. misses and moved are
    means per token and block.
    """

    loss: float
    margin: float
    speed: float
    expert_bytes: int
    misses: float
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """memory: the budget in bytes that it was made for; None if everything is in memory.

    sequences, prompt_logits: what it leaves room for, as of `LoadSettings`. promise: what it was
    chosen to keep.
    """

    configuration: Configuration
    memory: int | None
    context: int
    fingerprint: str
    dtype: str
    rule: str | None
    source: str
    predicted: Prediction
    sequences: int = 1
    prompt_logits: int = 0
    target: Target = field(default_factory=Target)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `moefit.load` that load the model by this plan."""
        return {
            "memory": self.memory,
            "context": self.context,
            "sequences": self.sequences,
            "prompt_logits": self.prompt_logits,
            "dtype": getattr(torch, self.dtype),
            **self.configuration.load_settings(),
            **self.configuration.policy_settings(),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": VERSION,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "rule": self.rule,
            "memory": self.memory,
            "context": self.context,
            "sequences": self.sequences,
            "prompt_logits": self.prompt_logits,
            "promise": asdict(self.target),
            "predicted": asdict(self.predicted),
            "configuration": self.configuration.as_dict(),
        }


def write_plan(plan: Plan, path: Path) -> None:
    """As JSON. Raises ConfigError if the file cannot be written."""
    _PLAN.write(plan.as_dict(), path)


def read_plan(path: Path) -> Plan:
    """Raises ConfigError for a file that is no plan of this version."""
    return _PLAN.read(path, _plan)


def _plan(values: Mapping[str, Any]) -> Plan:
    if values["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {values['dtype']!r}")
    return Plan(
        configuration=configuration_from(values["configuration"]),
        memory=values["memory"],
        context=values["context"],
        fingerprint=values["fingerprint"],
        dtype=values["dtype"],
        rule=values["rule"],
        source=values["source"],
        predicted=Prediction(**values["predicted"]),
        sequences=values.get("sequences", 1),  # not in plans of moefit before servers planned
        prompt_logits=values.get("prompt_logits", 0),
        target=Target(**values.get("promise", {})),
    )


def refuse_other(plan: Plan, skeleton: Skeleton, path: Path) -> None:
    """Raise ConfigError if the plan was made for another checkpoint."""
    if plan.fingerprint != fingerprint(skeleton):
        raise ConfigError(
            f"{path} is a plan for another checkpoint ({plan.source}), not for "
            f"{skeleton.checkpoint.folder}; {_AGAIN} on this one"
        )
