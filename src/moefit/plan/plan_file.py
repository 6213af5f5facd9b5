"""Plans: a configuration chosen for a memory budget, and the file that stores it.

`Target` states what a plan must satisfy besides its budget: a maximum loss or a minimum speed.
`PlanChooser` picks the point of a Pareto front that satisfies a target. A plan file contains all
settings that loading the model needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefit.errors import ConfigError, UnreachedTargetError
from moefit.plan.configuration import Configuration, Lengths, configuration_from
from moefit.plan.profile import RecordKind
from moefit.plan.search import Point
from moefit.quant.kv_int8 import KV_CACHES, MODEL_CACHE
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.packed.store import fingerprint

DEFAULT_LOSS = 0.02  # maximum relative increase in perplexity of a plan without a target


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a plan must satisfy.

    Without a maximum loss or a minimum speed, a plan is the fastest whose loss is at most
    `DEFAULT_LOSS`, or the one of least loss if there is none.

    Attributes:
        max_loss: Maximum relative increase in perplexity over the full model, 0.03 for 3%.
        min_speed: Minimum decoding speed in tokens per second.
    """

    max_loss: float | None = None
    min_speed: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is a maximum loss or a minimum speed."""
        return self.max_loss is not None or self.min_speed is not None

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise ConfigError(
                f"max-loss is {self.max_loss!r}, but it must be a share of 0 or more, such as 3% "
                "or 0.03"
            )
        if self.min_speed is not None and not 0 < self.min_speed < math.inf:
            raise ConfigError(
                f"min-speed is {self.min_speed!r}, but it must be a number of tokens/s above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChooser:
    """Choose a point of a Pareto front.

    Attributes:
        margin: Median error of predicted losses.
        tolerance: Points whose times differ by less than this share count as equally fast.
    """

    margin: float
    tolerance: float

    def choose(self, front: Sequence[Point], target: Target, memory: int) -> Point:
        """Return the best point that satisfies a target.

        Args:
            front: Candidates within the budget; at least one.
            target: What the point must satisfy.
            memory: The budget in bytes, for the error message.

        Raises:
            UnreachedTargetError: No point satisfies it. The message names the nearest ones.
        """
        target.check()
        if not (good := [point for point in front if self.satisfies(point, target)]):
            raise UnreachedTargetError(self._unsatisfied(front, target, memory))
        if target.min_speed is not None:
            return min(good, key=lambda point: (point.loss, point.seconds))
        if target.max_loss is None:
            good = [point for point in front if point.loss <= DEFAULT_LOSS]
        return self._best_of_fastest(good) if good else min(front, key=lambda point: point.loss)

    def satisfies(self, point: Point, target: Target) -> bool:
        """Return whether a point satisfies a target, its loss with the margin added."""
        return (target.max_loss is None or self._loss_bound(point) <= target.max_loss) and (
            target.min_speed is None or point.speed >= target.min_speed
        )

    def _best_of_fastest(self, points: Sequence[Point]) -> Point:
        """Return the point of least loss among those within `tolerance` of the fastest."""
        fastest = min(point.seconds for point in points)
        near = [point for point in points if point.seconds <= fastest * (1 + self.tolerance)]
        return min(near, key=lambda point: (point.loss, point.seconds))

    def _loss_bound(self, point: Point) -> float:
        """Return the loss with the margin added, which is at most the loss itself."""
        return point.loss + min(self.margin, max(0.0, point.loss))

    def _unsatisfied(self, front: Sequence[Point], target: Target, memory: int) -> str:
        best, fastest = min(front, key=lambda p: p.loss), min(front, key=lambda p: p.seconds)
        limits: list[str] = []
        if target.max_loss is not None:
            limits.append(f"a loss of at most {target.max_loss:.2%}")
        if target.min_speed is not None:
            limits.append(f"at least {target.min_speed:g} tokens/s")
        # Rounded so that the values in the message are themselves satisfiable targets.
        loss = math.ceil(1e4 * self._loss_bound(best)) / 1e4
        return (
            f"no plan for {format_bytes(memory)} satisfies {' and '.join(limits)}; the most "
            f"accurate has a loss of {loss:.2%} at {_round_down(best.speed):.2f} tokens/s, and the "
            f"fastest makes {_round_down(fastest.speed):.2f} tokens/s at a loss of "
            f"{fastest.loss:.2%}"
        )


def _round_down(speed: float) -> float:
    return math.floor(100 * speed) / 100


VERSION = 1
_AGAIN = "create it again with moefit plan ... --save FILE"
_PLAN = RecordKind(
    name="plan",
    version=VERSION,
    version_at=("version",),
    make=_AGAIN,
    again=_AGAIN,
    elsewhere="name a file in a folder that is writable",
    indent=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the models predict for a plan.

    Attributes:
        loss: Relative increase in perplexity over the full model.
        margin: Median error of predicted losses on held-out samples.
        speed: Decoding speed of one sequence, in tokens per second.
        expert_bytes: Bytes of all slots.
        misses: Experts that a token waits for, per block.
        moved: Share of a token's router weight that other experts get, per block.
    """

    loss: float
    margin: float
    speed: float
    expert_bytes: int
    misses: float
    moved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration, what it was chosen for and what is predicted of it.

    Attributes:
        configuration: How the model is served.
        memory: The memory budget in bytes; None if all experts are in memory.
        context: Tokens that the KV cache is reserved for.
        fingerprint: Identifies the checkpoint.
        dtype: Name of the torch dtype that the model is loaded in.
        rule: Inference rule of a DS-MoE; None for the model's own.
        source: Folder of the checkpoint when the model was profiled.
        predicted: Loss and speed.
        sequences: Concurrent sequences whose logits fit, as in `LoadSettings`.
        prompt_logits: Bytes reserved for the logits of prompts, as in `LoadSettings`.
        target: What the plan was chosen to satisfy.
        lengths: Of an encoder-decoder's requests that speed is predicted for; None for decoders.
        kv_cache: What the KV cache holds, as in `LoadSettings`.
        step_tokens: Tokens of one forward pass that activations are reserved for, as in
            `LoadSettings`; None for prompts as long as the context.
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
    lengths: Lengths | None = None
    kv_cache: str = MODEL_CACHE
    step_tokens: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `moefit.load` that load the model as planned."""
        return {
            "memory": self.memory,
            "context": self.context,
            "sequences": self.sequences,
            "prompt_logits": self.prompt_logits,
            "kv_cache": self.kv_cache,
            "step_tokens": self.step_tokens,
            "dtype": getattr(torch, self.dtype),
            **self.configuration.load_settings(),
            **self.configuration.policy_settings(),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
            "kv_cache": self.kv_cache,
            "step_tokens": self.step_tokens,
            "promise": asdict(self.target),
            "lengths": self.lengths and asdict(self.lengths),
            "predicted": asdict(self.predicted),
            "configuration": self.configuration.as_dict(),
        }


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON. Raises ConfigError if the file cannot be written."""
    _PLAN.write(plan.as_dict(), path)


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: The file is missing, damaged, or not a plan of this version.
    """
    return _PLAN.read(path, _plan_from)


def _plan_from(values: Mapping[str, Any]) -> Plan:
    if values["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {values['dtype']!r}")
    if values.get("kv_cache", MODEL_CACHE) not in KV_CACHES:
        raise ValueError(f"kv_cache {values['kv_cache']!r}")
    steps = values.get("step_tokens")  # absent in plans that reserve prompts as long as the context
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"step_tokens {steps!r}")
    return Plan(
        configuration=configuration_from(values["configuration"]),
        memory=values["memory"],
        context=values["context"],
        fingerprint=values["fingerprint"],
        dtype=values["dtype"],
        rule=values["rule"],
        source=values["source"],
        predicted=Prediction(**values["predicted"]),
        sequences=values.get("sequences", 1),  # absent in plans written before servers used them
        prompt_logits=values.get("prompt_logits", 0),
        target=Target(**values.get("promise", {})),
        lengths=Lengths(**lengths) if (lengths := values.get("lengths")) else None,
        kv_cache=values.get("kv_cache", MODEL_CACHE),
        step_tokens=steps,
    )


def check_checkpoint(plan: Plan, skeleton: Skeleton, path: Path) -> None:
    """Raise ConfigError if a plan was made for another checkpoint than `skeleton`'s."""
    if plan.fingerprint != fingerprint(skeleton):
        raise ConfigError(
            f"{path} is a plan for another checkpoint ({plan.source}), not for "
            f"{skeleton.checkpoint.folder}; {_AGAIN} for this one"
        )
