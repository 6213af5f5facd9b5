"""A plan: the configuration that was chosen, for which model and budget, and what was predicted.

Owns the record and its form on disk. `Plan.settings` is what loads it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefit.errors import ConfigError
from moefit.plan.configuration import Configuration, configuration_from
from moefit.serve.packed import fingerprint
from moefit.serve.skeleton import Skeleton

VERSION = 1
_AGAIN = "make it again with moefit plan ... --save FILE"


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
    """memory: the budget in bytes that it was made for; None if everything is in memory."""

    configuration: Configuration
    memory: int | None
    context: int
    fingerprint: str
    dtype: str
    rule: str | None
    source: str
    predicted: Prediction

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `moefit.load` that load the model by this plan."""
        return {
            "memory": self.memory,
            "context": self.context,
            "dtype": getattr(torch, self.dtype),
            **self.configuration.load_settings(),
            **self.configuration.policy_settings(),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        predicted = {name: getattr(self.predicted, name) for name in Prediction.__slots__}
        return {
            "version": VERSION,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "rule": self.rule,
            "memory": self.memory,
            "context": self.context,
            "predicted": predicted,
            "configuration": self.configuration.as_dict(),
        }


def write_plan(plan: Plan, path: Path) -> None:
    """As JSON. Raises ConfigError if the file cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the plan {path}: {error.strerror or error}; name a file in a folder "
            "that can be written to"
        ) from error


def read_plan(path: Path) -> Plan:
    """Raises ConfigError for a file that is no plan of this version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no plan {path}; {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a plan ({error}); {_AGAIN}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ConfigError(
            f"{path} is a plan of version {version!r}, and this moefit reads version {VERSION}; "
            f"{_AGAIN}"
        )
    try:
        return _plan(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is a damaged plan ({error!r}); {_AGAIN}") from error


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
    )


def refuse_other(plan: Plan, skeleton: Skeleton, path: Path) -> None:
    """Raise ConfigError if the plan was made for another checkpoint."""
    if plan.fingerprint != fingerprint(skeleton):
        raise ConfigError(
            f"{path} is a plan for another checkpoint ({plan.source}), not for "
            f"{skeleton.checkpoint.folder}; {_AGAIN} on this one"
        )
