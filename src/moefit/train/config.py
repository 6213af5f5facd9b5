"""What a training run is made of, as one strict record.

Owns the names, defaults and sanity of every setting, and the reading of `CONFIG.yaml key=value`.
An unknown key is an error. Knows nothing of tensors, files of text or how training is done.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from moefit.errors import ConfigError
from moefit.moe.expert_dropout import Order
from moefit.moe.routing import Rule
from moefit.yaml_text import load_yaml

STDLIB = "stdlib"
WARMUP_STEPS = 100


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _several(given: Any) -> Any:
    """Return a list of one for one text: `data.sources=book.txt` names one file."""
    return [given] if isinstance(given, str) else given


Sources = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""Files, folders or data sets; one alone need not be a list."""


class DataConfig(_Strict):
    """Where the text comes from and how it becomes tokens.

    `sources` are files or folders (.txt, .md, .rst, .py, .jsonl, .parquet), `stdlib`, the source
    of the running Python's standard library, or a Hugging Face dataset: `hf:DATASET[:SPLIT]`, or
    `hf:DATASET@CONFIG[:SPLIT]` if it has several configurations; the split is train if not given.

    Without `held_out`, whole documents are held out, chosen by a hash of their names; where that
    leaves one side empty (a single file, a few novels), the end of every document is instead.
    """

    sources: Sources = (STDLIB,)
    held_out: Sources = ()
    """Sources to evaluate on; when empty, `held_out_fraction` of the documents is held out."""
    held_out_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    text_key: str = "text"
    max_bytes: int | None = Field(default=None, gt=0)
    """Read at most this much text; for quick runs."""
    tokenizer: str | None = None
    """A tokenizer.json or a folder holding one; when None, a BPE is trained on the corpus."""
    vocab_size: int = Field(default=4096, ge=257)
    cache_dir: str | None = None
    """Where token files are kept; $XDG_CACHE_HOME/moefit/data when None, where
    XDG_CACHE_HOME is ~/.cache if it is not set."""


class ModelConfig(BaseModel):
    """The architecture: a named preset, fields of the model's own configuration, or both.

    Every further key is a field of `DsMoeConfig` (or of transformers' `OlmoeConfig` when
    `architecture: olmoe`); the vocabulary size comes from the tokenizer.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    architecture: Literal["dsmoe", "olmoe"] = "dsmoe"
    preset: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The model configuration's own fields, as given."""
        return dict(self.__pydantic_extra__ or {})


_Share = Annotated[float, Field(ge=0, le=1)]


class LossConfig(_Strict):
    """Weights of the router losses, each summed over layers; alpha in the DS-MoE paper.

    What is not given is what the model's preset says, and zero without a preset.
    """

    mlp_mi: float | None = Field(default=None, ge=0)
    attention_mi: float | None = Field(default=None, ge=0)
    load_balancing: float | None = Field(default=None, ge=0)
    z: float | None = Field(default=None, ge=0)
    mi_ramp: tuple[_Share, _Share] = (0.0, 0.0)
    """Shares of the training between which both MI weights rise from zero to their full value."""
    routing_locality: float = Field(default=0.0, ge=0)
    """Weight of the mean squared change of routing from one token to the next."""

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are given, by name."""
        return self.model_dump(exclude_none=True, exclude={"mi_ramp", "routing_locality"})


class SparseConfig(_Strict):
    """Steps in which only the experts that a rule chooses take part.

    Among dense ones they teach the model to answer with few experts as it answers with all, and
    so to lose little when memory is cut.
    """

    rule: str | None = None
    """As for inference, such as `top_k:4`; None: every step is dense."""
    share: float = Field(default=0.5, gt=0, le=1)
    """How many of the steps are sparse, evenly spread, once `start` of the training is done."""
    start: _Share = 0.0

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str | None) -> str | None:
        try:
            return None if rule is None else str(Rule.parse(rule))
        except ConfigError as error:
            raise ValueError(str(error)) from error


class ExpertDropoutConfig(_Strict):
    """Sequences that see only some of the experts, as in a server that holds only some in memory.

    In such a sequence only S of the E experts of a layer may be chosen; S is uniform in
    [least, E - 1], and the same in all layers.
    """

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the sequences in which experts are absent."""
    order: Order
    """`random`: any S experts. `nested`: the S most important ones, as measured when dropout
    begins. `mixed`: nested in half of the sequences, random in the others."""
    least: int | None = Field(default=None, ge=1)
    """Least S. By default the number of experts that the model's rules choose per token; a quarter
    of the experts if no rule fixes a number."""
    begin: float = Field(default=0.6, ge=0, lt=1)
    """Share of the training steps before experts are dropped."""


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(_Strict):
    """AdamW with linear warm-up and a cosine down to `final_lr_ratio` of the peak."""

    lr: float = Field(default=1e-3, gt=0)
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=WARMUP_STEPS, ge=0)
    """In a run whose configuration gives none, at most a tenth of its steps."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)


class LogConfig(_Strict):
    """What is written down, and how often (in optimizer steps)."""

    every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    eval_tokens: int = Field(default=65536, gt=0)
    epsilon: float = Field(default=0.48, gt=0)
    """Threshold under which experts are counted as active in the log."""
    tensorboard: bool = False


class CheckpointConfig(_Strict):
    """How often (in optimizer steps) the whole state is saved, and how many are kept."""

    every: int = Field(default=200, gt=0)
    keep: int = Field(default=2, gt=0)


class TrainConfig(_Strict):
    """One training run. `batch_size` counts sequences of one forward; a step does
    `accumulation` of them.
    """

    out: str = "runs/default"
    model: ModelConfig = ModelConfig(preset="dsmoe-tiny")
    start_from: str | None = None
    """A run or model folder whose weights training begins with; random ones if none."""
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    sparse: SparseConfig = SparseConfig()
    expert_dropout: ExpertDropoutConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = Field(default=1000, gt=0)
    seq_len: int = Field(default=256, gt=1)
    batch_size: int = Field(default=16, gt=0)
    accumulation: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    """`auto` is the first CUDA device, else the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast on CUDA and on CPUs with matrix units for it, else fp32."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_follow(cls, tree: Any) -> Any:
        """Let defaults follow what is given: a contradiction must be one between given values."""
        if not isinstance(tree, dict):
            return tree
        given = cast("dict[str, Any]", tree)
        steps, optimizer = given.get("steps"), given.get("optimizer", {})
        if isinstance(steps, float) and steps.is_integer():  # 2e3, which is taken as well
            steps = int(steps)
        if not isinstance(steps, int):  # the default's own warm-up fits it, others are refused
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
    def _fits_together(self) -> Self:
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of "
                f"steps={self.steps}; the most that works is {self.steps - 1}"
            )
        start, end = self.loss.mi_ramp
        if start > end:
            raise ValueError(f"loss.mi_ramp=[{start}, {end}] ends before it starts; swap them")
        return self


def read_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """A YAML file (or none: all defaults) with `a.b=value` overrides, each value read as YAML.

    Raises ConfigError for an unreadable file, an unknown key or a value out of bounds.
    """
    tree = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return make_config(tree)


def make_config(tree: dict[str, Any]) -> TrainConfig:
    """A nested dict as a TrainConfig; errors as in `read_config`."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:  # ConfigError, or no UTF-8
        raise ConfigError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, but a mapping is needed")
    return cast(dict[str, Any], tree)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{override!r} is no override; write key=value, such as optimizer.lr=3e-4"
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


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] != "extra_forbidden":
        given = (
            "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
        )
        return f"{where}: {item['msg'].removeprefix('Value error, ')}{given}"
    *parents, leaf = item["loc"]
    known = list(_group(parents).model_fields)
    nearest = difflib.get_close_matches(str(leaf), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _group(parents: list[Any]) -> type[BaseModel]:
    group: type[BaseModel] = TrainConfig
    for parent in parents:
        annotation = group.model_fields[parent].annotation
        groups = (annotation, *get_args(annotation))  # of an optional group
        group = next(one for one in groups if isinstance(one, type) and issubclass(one, BaseModel))
    return group
