"""Groups of settings of a training run: data, model, losses, optimizer, log, processes.

Unknown keys and values out of range are errors.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from moefit.errors import ConfigError
from moefit.moe.expert_dropout import Order
from moefit.moe.routing import Rule

STDLIB = "stdlib"
WARMUP_STEPS = 100


class Strict(BaseModel):
    """A group whose keys are all known and whose values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    """Wrap a single string: `data.sources=book.txt` names one file."""
    return [value] if isinstance(value, str) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""Files, folders or datasets: a list or a single string."""


class WeightedSource(Strict):
    """A file, folder or dataset, and the proportion in which sequences are drawn from it."""

    path: str
    weight: float = Field(ge=0)


def _source_kind(value: Any) -> str:
    return "source" if isinstance(value, dict | WeightedSource) else "path"


Source = Annotated[
    Annotated[str, Tag("path")] | Annotated[WeightedSource, Tag("source")],
    Discriminator(_source_kind),
]


class DataConfig(Strict):
    """Text sources and tokenisation.

    `sources` are paths, or all of them `{path: ..., weight: ...}`. Paths are files or folders
    (.txt, .md, .rst, .py, .jsonl, .parquet), `stdlib` for the source code of the running Python's
    standard library, or Hugging Face datasets as `hf:DATASET[:SPLIT]` or
    `hf:DATASET@CONFIG[:SPLIT]`. The default split is train.

    Without `held_out`, whole documents are held out by a hash of their names. If that leaves either
    side empty, as with a single file, the end of each document is held out instead.
    """

    sources: Annotated[tuple[Source, ...], BeforeValidator(_as_list)] = (STDLIB,)
    """With weights, training sequences are drawn in their proportion, each source beginning anew
    when it has been used up. Held-out text has the sources' own proportions."""
    held_out: Sources = ()
    """Sources to evaluate on; if empty, `held_out_fraction` of the documents is held out."""
    held_out_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    text_key: str = "text"
    max_bytes: int | None = Field(default=None, gt=0)
    """Most bytes of text to read, for quick runs."""
    tokenizer: str | None = None
    """A tokenizer.json or a folder with one; None trains a BPE on the corpus."""
    vocab_size: int = Field(default=4096, ge=257)
    document_mask: bool = False
    """Documents that share a sequence do not see each other: attention and positions begin anew
    at each. Otherwise a sequence is one stretch of text."""
    shard_by: Literal["none", "source"] = "none"
    """`source`: with N machines, machine n trains on sources n, n + N, ..., an equal share of each
    batch. `none`: all machines train on all text."""
    cache_dir: str | None = None
    """Folder for token files; None is $XDG_CACHE_HOME/moefit/data or ~/.cache/moefit/data."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The sources without weights."""
        return tuple(one if isinstance(one, str) else one.path for one in self.sources)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weights of the sources; None if they have none."""
        weights = tuple(one.weight for one in self.sources if not isinstance(one, str))
        return weights or None

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.weights is None:
            return self
        without = [one for one in self.sources if isinstance(one, str)]
        if without:
            raise ValueError(
                f"sources have weights, but {', '.join(without)} has none; give all a weight, such "
                f"as {{path: {without[0]}, weight: 0.5}}, or none"
            )
        if not any(self.weights):
            raise ValueError(
                "all weights of sources are 0, so nothing could be drawn; give one above 0"
            )
        if self.shard_by == "source":
            raise ValueError(
                "weights of sources do not work with shard_by=source, where each machine has an "
                "equal share of a batch for its own sources; give shard_by=none, or no weights"
            )
        return self


class ModelConfig(BaseModel):
    """Model architecture: a preset, fields of the model's configuration, or both.

    Further keys are fields of `DsMoeConfig`, or of transformers' `OlmoeConfig` with
    `architecture: olmoe`. The vocabulary size comes from the tokenizer.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    architecture: Literal["dsmoe", "olmoe"] = "dsmoe"
    preset: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the model's configuration that were given."""
        return dict(self.__pydantic_extra__ or {})


_Fraction = Annotated[float, Field(ge=0, le=1)]


class LossConfig(Strict):
    """Weights of the router losses, each summed over layers (alpha in the DS-MoE paper).

    Defaults are those of the model's preset, and zero without a preset.
    """

    mlp_mi: float | None = Field(default=None, ge=0)
    attention_mi: float | None = Field(default=None, ge=0)
    load_balancing: float | None = Field(default=None, ge=0)
    z: float | None = Field(default=None, ge=0)
    balancing_bias: float = Field(default=0.0, ge=0)
    """Loss-free balancing (arXiv 2408.15664): after each step a bias of each expert, added to its
    score for the choice alone, moves by this much towards an even load. 0 for no bias."""
    mi_ramp: tuple[_Fraction, _Fraction] = (0.0, 0.0)
    """Fractions of training between which both MI weights rise from zero to their full value."""
    routing_locality: float = Field(default=0.0, ge=0)
    """Weight of the mean squared change of routing from one token to the next."""
    gate_kl: float = Field(default=0.0, ge=0)
    """Weight of KL(old || new) between the routers of `start_from` and pre-gated ones
    (any value of `model.pregated` but false), summed over layers."""
    locality: float = Field(default=0.0, ge=0)
    """mu of LocMoE's locality loss, which keeps tokens on the machine that they are on; summed over
    layers. Needs `parallel.experts: all_to_all`, and pays with `data.shard_by: source` only."""
    locality_ramp: tuple[_Fraction, _Fraction] = (0.0, 0.0)
    """Fractions of training between which mu rises from zero to its full value."""

    @property
    def weights(self) -> dict[str, float]:
        """Weights that were given, by name."""
        names = ("mlp_mi", "attention_mi", "load_balancing", "z")
        return self.model_dump(exclude_none=True, include=set(names))


class SparseConfig(Strict):
    """Training steps that use only the experts selected by a rule.

    Interleaved with dense steps they reduce the quality lost when inference uses few experts.
    """

    rule: str | None = None
    """An inference rule, such as `top_k:4`; None makes every step dense."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the steps after `start` that are sparse, evenly spaced."""
    start: _Fraction = 0.0
    """Fraction of training before the first sparse step."""

    @field_validator("rule")
    @classmethod
    def _check_rule(cls, rule: str | None) -> str | None:
        try:
            return None if rule is None else str(Rule.parse(rule))
        except ConfigError as error:
            raise ValueError(str(error)) from error


class ExpertDropoutConfig(Strict):
    """Training sequences in which only some of the experts are available, as in serving.

    In such a sequence only S of the E experts of a layer may be chosen, with S from `least` to
    E - 1 and the same in all layers.
    """

    share: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the sequences in which experts are absent."""
    order: Order
    """`random`: any S experts. `nested`: the S most important ones, as measured when dropout
    begins. `mixed`: nested in half of the sequences, random in the others."""
    least: int | None = Field(default=None, ge=1)
    """Least S. By default the number of experts that the model's rules choose per token; a quarter
    of the experts if no rule fixes a number."""
    sizes: Literal["uniform", "few"] = "few"
    """Distribution of S: `uniform`, or `few`, in proportion to 1 / S^2."""
    begin: float = Field(default=0.6, ge=0, lt=1)
    """Fraction of training before experts are dropped."""
    self_distillation: bool = True
    """Compute sequences with few experts twice: with all experts, where the text is the target, and
    with few, where the prediction with all experts is. A step then computes up to twice as many
    sequences."""
    distillation_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of what a sequence with few experts adds to the loss by self-distillation."""

    @model_validator(mode="after")
    def _check_the_weight_has_an_effect(self) -> Self:
        if self.distillation_weight != 1 and not self.self_distillation:
            raise ValueError(
                f"distillation_weight={self.distillation_weight:g} has no effect with "
                "self_distillation=false; leave it out, or give self_distillation=true"
            )
        return self

    @model_validator(mode="after")
    def _check_all_experts_are_trained(self) -> Self:
        if self.share == 1 and not self.self_distillation:
            raise ValueError(
                "share=1 with self_distillation=false would leave no sequence that trains all "
                "experts; give a share below 1, or self_distillation=true"
            )
        return self


class BudgetAwareConfig(Strict):
    """Routing that keeps to the experts which a server with few slots holds at each token."""

    weight: float = Field(gt=0)
    """Weight of the loss: a soft count of choices that evict, per choice, summed over layers."""
    share: float = Field(default=1 / 3, gt=0, lt=1)
    """Share of each layer's experts that the simulated server holds; at least the number that the
    model's rule chooses, at most all but one."""
    ramp: tuple[_Fraction, _Fraction] = (0.5, 0.6)
    """Fractions of training between which the weight rises from zero to its full value."""

    @model_validator(mode="after")
    def _check_ramp(self) -> Self:
        start, end = self.ramp
        if start > end:
            raise ValueError(f"ramp=[{start:g}, {end:g}] ends before it starts; swap them")
        if start >= 1:
            raise ValueError(
                f"ramp=[{start:g}, {end:g}] begins when training ends; the start must be below 1"
            )
        return self


class RoundingConfig(Strict):
    """Training steps in which experts are rounded as a server holds them."""

    formats: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    """Formats that each expert draws from in each step, such as int2, int3 and int4."""
    begin: float = Field(default=0.9, ge=0, lt=1)
    """Fraction of training before experts are rounded."""


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    """Optimizer and learning rate: linear warm-up, then a decay to `final_lr_ratio` of the peak."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices of layers, also each matrix of an expert, are updated by Muon with the same
    rates as AdamW; embeddings, head, routers and vectors by AdamW."""
    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Decay: `cosine` over all steps; `wsd` (warm-up, stable, decay) linear over the last ones."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """With `wsd`, the fraction of the steps in which the rate decays."""
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=WARMUP_STEPS, ge=0)
    """Defaults to at most a tenth of the run's steps."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    skip_sigma: float | None = Field(default=None, gt=0)
    """Leave the weights as they are in steps whose loss or gradient norm is more than this many
    standard deviations above the mean of the last 128 steps, or not finite. None skips no step,
    and stops at values that are not finite."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        default = type(self).model_fields["decay_share"].default
        if self.schedule != "wsd" and self.decay_share != default:
            raise ValueError(
                f"decay_share={self.decay_share:g} has no effect with schedule=cosine; leave it "
                "out, or give schedule=wsd"
            )
        return self


class LogConfig(Strict):
    """What is logged, and how often (in optimizer steps)."""

    every: int = Field(default=10, gt=0)
    eval_every: int = Field(default=200, gt=0)
    eval_tokens: int = Field(default=65536, gt=0)
    epsilon: float = Field(default=0.48, gt=0)
    """Score times number of experts above which an expert counts as active in the log."""
    tensorboard: bool = False
    """Also write the log's numbers for TensorBoard, into `OUT/tensorboard`."""
    wandb: bool = False
    """Also send them to Weights & Biases, as its environment variables say."""
    profile: tuple[int, int] | None = None
    """First and last step that torch's profiler records, per process, into `OUT/profile`."""

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(
                f"[{steps[0]}, {steps[1]}] are not the first and the last of some steps, counted "
                "from 1; give such as [10, 12]"
            )
        return steps


class CheckpointConfig(Strict):
    """How often (in optimizer steps) checkpoints are saved, and how many are kept."""

    every: int = Field(default=200, gt=0)
    keep: int = Field(default=2, gt=0)


class ParallelConfig(Strict):
    """How a run of many processes, started by torchrun, spreads the model over them."""

    replicate: int = Field(default=1, gt=0)
    """Copies of the model, each sharded over an equal number of consecutive processes (HSDP). The
    default shards one copy over all processes; the number of machines saves traffic between them.
    """
    reshard: bool = True
    """Free a layer's weights after its forward pass and gather them again for the backward pass:
    less memory, half as much traffic again."""
    mixed_precision: Literal["bf16"] | None = None
    """`bf16`: compute with weights rounded to bfloat16, and send them so; routers, weights that are
    updated, sums of gradients, optimizer and checkpoints in float32. Also of one process. None:
    weights compute as `precision` says, and travel in float32."""
    experts: Literal["data", "all_to_all"] = "data"
    """`data`: experts are sharded like all weights. `all_to_all`: each process has an equal part of
    every layer's experts, and tokens are sent to them; for sparse models."""
    expert: int | None = Field(default=None, gt=1)
    """With `all_to_all`, the number of consecutive processes that share the experts. Each such
    group has all experts, and gradients of experts are added over groups. None is all processes,
    or with `replicate` those of a copy of the model."""
    all_to_all: Literal["flat", "hierarchical"] = "flat"
    """Way of tokens to experts: `flat`, straight to their processes; `hierarchical`, once to each
    machine with some of a token's experts, and from there to the processes of that machine."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """With `all_to_all`, the most tokens that a process sends to an expert, in units of an even
    share; what is beyond has no output of the layer. None is no limit."""
    capacity_delta: float | None = Field(default=None, gt=0, lt=1)
    """Least cosine of a token with its expert's row of the router in LocMoE's lower bound of the
    capacity, which is printed at start; the paper measured 0.03. None is 1 / sqrt(hidden_size)."""
    expert_tensor: int = Field(default=1, gt=0)
    """Consecutive processes that share the tokens of a part of the batch and divide the experts
    of every layer among them, for the price of an all-reduce of the layer's outputs."""
    nodes: int | None = Field(default=None, gt=0)
    """Number of machines that processes are divided among; None is what torchrun says."""
    node_bias: float = Field(default=0.0, ge=0)
    """Added in training to the router logits of experts on the token's own machine."""
    node_limit: Literal["own"] | Annotated[int, Field(gt=0)] | None = None
    """Most machines whose experts a token uses in training: those with the highest scores, or with
    `own` only its own. None is no limit."""

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        names = ("capacity_factor", "capacity_delta", "node_bias")
        given = {name: getattr(self, name) for name in names}
        for name, value in given.items():
            if value and self.experts != "all_to_all":
                raise ValueError(
                    f"{name}={value:g} has no effect with experts=data; leave it out, or give "
                    "experts=all_to_all"
                )
        if self.expert is not None and self.experts != "all_to_all":
            raise ValueError(
                f"expert={self.expert} has no effect with experts=data; leave it out, or give "
                "experts=all_to_all"
            )
        if self.node_limit is not None and self.experts != "all_to_all":
            raise ValueError(
                f"node_limit={self.node_limit} has no effect with experts=data; leave it out, or "
                "give experts=all_to_all"
            )
        if self.all_to_all != "flat" and self.experts != "all_to_all":
            raise ValueError(
                f"all_to_all={self.all_to_all} has no effect with experts=data; leave it out, or "
                "give experts=all_to_all"
            )
        if self.experts == "all_to_all" and self.expert_tensor > 1:
            raise ValueError(
                f"expert_tensor={self.expert_tensor} and experts=all_to_all both divide the "
                "experts; give expert_tensor=1, or experts=data"
            )
        return self
