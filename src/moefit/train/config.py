"""Configuration of a training run, read from a YAML file and `key=value` overrides.

Unknown keys and values out of range are errors.
"""

import difflib
import logging
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from moefit.errors import ConfigError
from moefit.train.settings import (
    WARMUP_STEPS,
    BudgetAwareConfig,
    CheckpointConfig,
    DataConfig,
    ExpertDropoutConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RoundingConfig,
    SparseConfig,
    Strict,
    WeightedSource,
)
from moefit.yaml_text import load_yaml

_LOG = logging.getLogger(__name__)


class TrainConfig(Strict):
    """One training run."""

    out: str = "runs/default"
    """Folder of checkpoints and logs."""
    model: ModelConfig = ModelConfig(preset="dsmoe-tiny")
    start_from: str | None = None
    """A run or model folder with initial weights; None initialises them randomly."""
    continue_from: str | None = None
    """A checkpoint of another run, whose step, optimizer and random state this run starts with.

    Runs that differ only in settings without effect until then, such as `expert_dropout` before its
    `begin`, share the steps before it."""
    trainable: Literal["all", "routers", "low_rank"] = "all"
    """`routers`: of the weights of `start_from`, only routers and norms are trained. `low_rank`:
    also, of each expert's matrices, a change of rank `rank`."""
    rank: int = Field(default=8, gt=0)
    """With `trainable=low_rank`, of the changes."""
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    sparse: SparseConfig = SparseConfig()
    expert_dropout: ExpertDropoutConfig | None = None
    budget_aware: BudgetAwareConfig | None = None
    rounding: RoundingConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    steps: int = Field(default=1000, gt=0)
    seq_len: int = Field(default=256, gt=1)
    batch_size: int = Field(default=16, gt=0)
    """Sequences per forward pass, of all processes together."""
    accumulation: int = Field(default=1, gt=0)
    """Forward passes per optimizer step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    """`auto` is the first CUDA device, or the CPU if there is none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast on CUDA and on CPUs with AMX, fp32 elsewhere; with
    `parallel.mixed_precision`, what that says."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_warmup(cls, tree: Any) -> Any:
        """Shorten the default warm-up for short runs, so that it never contradicts `steps`."""
        if not isinstance(tree, dict):
            return tree
        given = cast("dict[str, Any]", tree)
        steps, optimizer = given.get("steps"), given.get("optimizer", {})
        if isinstance(steps, float) and steps.is_integer():  # 2e3 is valid too
            steps = int(steps)
        if not isinstance(steps, int):  # the default, or a type that validation rejects
            return given
        warmup = {"warmup_steps": min(WARMUP_STEPS, max(0, steps) // 10)}
        if isinstance(optimizer, dict):
            return {**given, "optimizer": {**warmup, **cast("dict[str, Any]", optimizer)}}
        if (
            isinstance(optimizer, OptimizerConfig)
            and not warmup.keys() & optimizer.model_fields_set
        ):
            return {**given, "optimizer": optimizer.model_copy(update=warmup)}
        return given

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is not below "
                f"steps={self.steps}; the most that works is {self.steps - 1}"
            )
        if self.log.profile is not None and self.log.profile[1] > self.steps:
            raise ValueError(
                f"log.profile={list(self.log.profile)} ends after steps={self.steps}; the last "
                f"step that works is {self.steps}"
            )
        start, end = self.loss.mi_ramp
        if start > end:
            raise ValueError(f"loss.mi_ramp=[{start}, {end}] ends before it starts; swap them")
        if self.start_from is not None and self.continue_from is not None:
            raise ValueError(
                "start_from and continue_from both give the weights; give start_from to train them "
                "from step 0, or continue_from to go on at its step"
            )
        return self

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.trainable != "all" and self.start_from is None:
            raise ValueError(
                f"trainable={self.trainable} would leave all other weights random; give "
                "start_from, or trainable=all"
            )
        if self.trainable != "all" and self.optimizer.name == "muon":
            raise ValueError(
                f"optimizer.name=muon updates matrices that trainable={self.trainable} does not "
                "train; give optimizer.name=adamw, or trainable=all"
            )
        if self.trainable != "low_rank" and self.rank != type(self).model_fields["rank"].default:
            raise ValueError(
                f"rank={self.rank} has no effect with trainable={self.trainable}; leave it out, or "
                "give trainable=low_rank"
            )
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        if self.parallel.mixed_precision and self.precision != "auto":
            raise ValueError(
                f"precision={self.precision} and parallel.mixed_precision="
                f"{self.parallel.mixed_precision} both choose the dtype that is computed in; leave "
                "precision out, or leave parallel.mixed_precision out"
            )
        if self.loss.locality and self.parallel.experts != "all_to_all":
            raise ValueError(
                f"loss.locality={self.loss.locality:g} has no effect with parallel.experts=data; "
                "leave it out, or give parallel.experts=all_to_all"
            )
        if self.compile and self.parallel.experts == "all_to_all":
            raise ValueError(
                "compile=true does not support parallel.experts=all_to_all, where the sizes of "
                "what is sent follow from routing in each layer; give compile=false"
            )
        start, end = self.loss.locality_ramp
        if start > end:
            raise ValueError(
                f"loss.locality_ramp=[{start}, {end}] ends before it starts; swap them"
            )
        return self


def read_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """Read a configuration file and apply overrides.

    Args:
        path: A YAML file; None for the defaults.
        overrides: Items such as `optimizer.lr=3e-4`, with values in YAML. Fewer steps than the
            file's warm-up shorten it, with a warning.

    Raises:
        ConfigError: The file cannot be read, or a key is unknown or a value out of range.
    """
    tree = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    keys = {override.partition("=")[0] for override in overrides}
    if "steps" in keys and not keys & {"optimizer", "optimizer.warmup_steps"}:
        _fit_warmup(tree)
    return make_config(tree)


def _fit_warmup(tree: dict[str, Any]) -> None:
    """Remove a file's warm-up that is longer than the training."""
    steps, optimizer = tree["steps"], tree.get("optimizer")
    if not isinstance(steps, int | float) or not isinstance(optimizer, dict):
        return
    warmup = cast("dict[str, Any]", optimizer).get("warmup_steps")
    if isinstance(warmup, int | float) and warmup >= steps > 0:
        del optimizer["warmup_steps"]
        _LOG.warning(
            "warning: the file's optimizer.warmup_steps=%s leaves nothing of steps=%s; the warm-up "
            "is a tenth of the steps, unless optimizer.warmup_steps is given on the command line",
            warmup,
            steps,
        )


def make_config(tree: dict[str, Any]) -> TrainConfig:
    """Return the configuration of a nested dict; raises ConfigError as `read_config` does."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe_error(item) for item in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:  # ConfigError, or not UTF-8
        raise ConfigError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} contains a {type(tree).__name__}, but must contain a mapping")
    return cast(dict[str, Any], tree)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{override!r} is not an override; write key=value, such as optimizer.lr=3e-4"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        group: Any = tree.setdefault(parent, {})
        if not isinstance(group, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a group of settings")
        tree = cast(dict[str, Any], group)
    try:
        tree[leaf] = load_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{override!r}: {text!r} is not a YAML value") from error


def _describe_error(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] != "extra_forbidden":
        given = (
            "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
        )
        return f"{where}: {item['msg'].removeprefix('Value error, ')}{given}"
    *parents, leaf = item["loc"]
    group: type[BaseModel] = TrainConfig
    if parents[:2] == ["data", "sources"]:
        group = WeightedSource
    else:
        for parent in parents:
            annotation = group.model_fields[parent].annotation
            groups = (annotation, *get_args(annotation))  # of an optional group
            group = next(x for x in groups if isinstance(x, type) and issubclass(x, BaseModel))
    known = list(group.model_fields)
    nearest = difflib.get_close_matches(str(leaf), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"
