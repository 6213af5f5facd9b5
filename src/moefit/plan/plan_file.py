"""A plan: the configuration that was chosen, for which model and budget, and what was predicted.

Owns the record and its form in JSON. `Plan.settings` is what loads it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefit.errors import ConfigError
from moefit.plan.configuration import Configuration, configuration_from
from moefit.plan.promise import Promise
from moefit.plan.record_file import RecordKind
from moefit.serve.packed import fingerprint
from moefit.serve.skeleton import Skeleton

VERSION = 1
_AGAIN = "make it again with moefit plan ... --save FILE"
_KIND = RecordKind(
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
    promise: Promise = field(default_factory=Promise)

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
            "promise": asdict(self.promise),
            "predicted": asdict(self.predicted),
            "configuration": self.configuration.as_dict(),
        }


def write_plan(plan: Plan, path: Path) -> None:
    """As JSON. Raises ConfigError if the file cannot be written."""
    _KIND.write(plan.as_dict(), path)


def read_plan(path: Path) -> Plan:
    """Raises ConfigError for a file that is no plan of this version."""
    return _KIND.read(path, _plan)


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
        promise=Promise(**values.get("promise", {})),
    )


def refuse_other(plan: Plan, skeleton: Skeleton, path: Path) -> None:
    """Raise ConfigError if the plan was made for another checkpoint."""
    if plan.fingerprint != fingerprint(skeleton):
        raise ConfigError(
            f"{path} is a plan for another checkpoint ({plan.source}), not for "
            f"{skeleton.checkpoint.folder}; {_AGAIN} on this one"
        )
