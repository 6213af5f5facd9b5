"""Configuration of a served model: load settings, the policy for misses, and placements.

`LoadSettings` are the arguments of `moefit.load`, `Policy` says how steps handle experts that are
not resident, and a `Placement` sets slots and formats per block, as the planner writes them. All
are frozen; `check` validates them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import torch

from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.moe.families import MoeBlock
from moefit.quant.format import NATIVE, Format, GroupedFormat, parse_format
from moefit.quant.kv_int8 import INT8_CACHE, KV_CACHES, MODEL_CACHE
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.hf.generation_config import AUTO, IGNORE, NONE
from moefit.serve.hybrid.rules import AUTO_COMPUTE, check_host_compute
from moefit.serve.precision.allocate import AUTO_FORMATS

Mode = Literal["exact", "bounded", "virtual"]
Update = Literal["manager", "fixed"]
Prefetch = Literal["off", "auto", "on"]
MAX_HORIZON = 4  # layers ahead for which experts are predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How steps handle experts that are not resident. One policy for all blocks.

    Args:
        mode: For steps of one token per sequence. `exact` loads missing experts, `bounded`
            substitutes residents within `bound`, `virtual` uses residents only.
        prefill: The mode for longer steps.
        bound: In bounded mode, the largest share of a token's router weight to substitute.
        ramp: How the bound grows with depth, since errors in early blocks propagate through all
            later ones: 0 is `bound` in every block, 1 grows from zero to twice the bound.
        protected: In bounded mode, how many of a token's best experts are never substituted.
        residency: `fixed` retains the resident set, so that evaluation is repeatable; experts that
            were fetched are evicted after the step.
        keep_mass: Scale changed weights of a token to the sum of the router's own choice. Without
            effect for families that normalize weights.
    """

    mode: Mode = "exact"
    prefill: Mode = "exact"
    bound: float = 0.3
    ramp: float = 1.0
    protected: int = 1
    residency: Update = "manager"
    keep_mass: bool = True

    def changed(self, mode: Mode, **settings: Any) -> "Policy":
        """Return this policy in another mode, with other settings changed.

        Args:
            mode: The new mode.
            settings: Other fields. `prefill` is by default virtual in virtual mode, else exact.

        Raises:
            ConfigError: A setting or value is unknown.
        """
        settings.setdefault("prefill", "virtual" if mode == "virtual" else "exact")
        try:
            policy = replace(self, mode=mode, **settings)
        except TypeError as error:
            known = ", ".join(Policy.__slots__)
            raise ConfigError(f"unknown setting in {sorted(settings)}; use {known}") from error
        policy.check()
        return policy

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        choices = {"mode": Mode, "prefill": Mode, "residency": Update}
        for name, kind in choices.items():
            if (value := getattr(self, name)) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"{name}={value!r} is not one of {known}")
        if not _is_number(self.bound) or not 0 <= self.bound <= 1:
            raise ConfigError(f"bound={self.bound!r}, but it is a share of router weight, 0 to 1")
        if not _is_number(self.ramp) or not 0 <= self.ramp <= 1:
            raise ConfigError(f"ramp={self.ramp!r}, but it is 0 to 1")
        if type(self.protected) is not int or self.protected < 0:
            raise ConfigError(f"protected={self.protected!r}, but it counts experts, 0 or more")

    def bound_at(self, depth: float) -> float:
        """Return the bound of a block at relative depth 0 to 1; the mean over blocks is `bound`.

        >>> Policy(bound=0.25, ramp=1.0).bound_at(0.75)
        0.375
        """
        return min(1.0, self.bound * (1 + self.ramp * (2 * depth - 1)))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlacement:
    """Slots and formats of one block.

    Args:
        slots: Number of slots.
        formats: One format name for all slots, or one per expert; the latter requires a slot for
            every expert, and makes all of them resident.
    """

    slots: int
    formats: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether every expert has a slot of its own format."""
        return len(self.formats) > 1

    def format_of(self, expert: int) -> Format:
        """Return the format of an expert while it is resident."""
        return parse_format(self.formats[expert if self.by_expert else 0])

    def distinct(self) -> tuple[Format, ...]:
        """Return the different formats."""
        return tuple(parse_format(name) for name in dict.fromkeys(self.formats))

    def largest(self, block: MoeBlock) -> Format:
        """Return the format with the largest slots."""
        return max(self.distinct(), key=lambda format: format.nbytes(block.layout.specs))

    def nbytes(self, block: MoeBlock) -> int:
        """Return the bytes of all slots."""
        specs = block.layout.specs
        if not self.by_expert:
            return self.slots * self.distinct()[0].nbytes(specs)
        sizes = {format.name: format.nbytes(specs) for format in self.distinct()}
        return sum(sizes[name] for name in self.formats)


Placement = Mapping[str, BlockPlacement]
"""Placement of each block, by name."""


def check_placement(placement: Placement, blocks: Sequence[MoeBlock]) -> None:
    """Raise ConfigError if a placement does not fit these blocks."""
    if set(placement) != {block.name for block in blocks}:
        known = [block.name for block in blocks]
        odd = sorted(set(placement).symmetric_difference(known))
        raise ConfigError(
            f"a placement of {len(placement)} blocks does not fit a model with {len(known)} of "
            f"them; they differ in {', '.join(odd[:3])}; plan again for this model"
        )
    for block in blocks:
        _check_block(placement[block.name], block)


def _check_block(placed: BlockPlacement, block: MoeBlock) -> None:
    if type(placed.slots) is not int or not 1 <= placed.slots <= block.num_experts:
        raise ConfigError(
            f"{block.name} is assigned {placed.slots!r} slots, but it has {block.num_experts} "
            f"experts; give 1 to {block.num_experts}"
        )
    placed.distinct()  # raises for unknown formats
    wanted = 1 if placed.slots < block.num_experts else block.num_experts
    if len(placed.formats) not in (1, wanted):
        raise ConfigError(
            f"{block.name} is assigned {len(placed.formats)} formats for {placed.slots} slots and "
            f"{block.num_experts} experts; give one format, or one per expert where every expert "
            "has a slot"
        )


AUTO_PRECISION, NATIVE_PRECISION = "auto", NATIVE.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a model is loaded and served.

    Args:
        memory: Budget as a size; None means as much as it takes.
        host_memory: On a GPU, size of the host cache of experts; None is one buffer per reader.
        host_compute: On a GPU, which misses that lie in host memory are computed there instead of
            being fetched: `auto` those with which layers take least time, by measured costs, or
            the name of a rule (`serve/hybrid/rules.py`), such as `fetch-all`.
        mode: How steps handle missing experts (see `Policy`).
        device: `cpu`, `cuda` or `cuda:N`.
        context: Tokens that the KV cache is reserved for, over all sequences.
        step_tokens: Tokens that one forward pass computes at most, for which activations are
            reserved; longer prompts are computed in several. None is the whole context.
        eviction: Policy of exact and bounded modes (`serve/cache/eviction.py`).
        precision: Format of experts (`quant/format.py`). `native` is the checkpoint's own, `auto`
            selects one per expert within the budget.
        dense_precision: Format of dense weights except routers and vectors; they are held
            unencoded while being encoded. `native` keeps a quantised checkpoint's codes in linear
            layers on CPUs, `decoded` does not.
        dtype: Of unencoded weights; None is the checkpoint's own.
        readers: Threads that read experts.
        half_life_tokens: Of expert importance.
        manager: Plans swaps in virtual mode.
        placement: Slots and formats per block, instead of equal shares in one precision.
        sequences: How many sequences a step may return logits for.
        draft_rows: How many drafted tokens a step may return logits for besides.
        prompt_logits: Largest size in bytes of a step's prompt logits, where requested.
        helpers: Bytes of other processes that count against the same budget.
        kv_cache: `model` holds keys and values in the model's dtype, `int8` rounds them to eight
            bits with a scale per token and head.
        generation_config: `auto` follows the checkpoint's generation_config.json, `none` takes
            only special tokens from it, `ignore` does not read it.
        adapter: Folder of a LoRA adapter (PEFT), which is merged into dense weights.
        prefetch: Whether exact mode reads the experts that the next layer is predicted to choose:
            `off`, `on`, or `auto` for as long as steps are measured to be faster with it.
        draft: Folder of a smaller model with the same tokenizer, which drafts tokens; held whole,
            within the budget.
        mtp: Load the layer for multi-token prediction, which drafts tokens, if the checkpoint has
            one of the form of DeepSeek-V3 and GLM-4.5.
        prefetch_horizon: How many layers ahead experts are predicted and read, 1 to 4.
        probe_depth: How many layers ahead trained probes are held for at least, if the model has
            any, to measure them; prefetching uses those within its horizon.
    """

    memory: str | int | None = None
    host_memory: str | int | None = None
    host_compute: str = AUTO_COMPUTE
    mode: Mode = "exact"
    device: str = "cpu"
    context: int = 2048
    step_tokens: int | None = None
    eviction: str = DEFAULT_POLICY
    precision: str = NATIVE_PRECISION
    dense_precision: str = NATIVE_PRECISION
    dtype: torch.dtype | None = None
    readers: int = 4
    half_life_tokens: float = 24.0
    manager: VirtualExpertManager = field(default_factory=VirtualExpertManager)
    placement: Placement | None = None
    sequences: int = 1
    draft_rows: int = 0
    prompt_logits: int = 0
    helpers: int = 0
    kv_cache: str = MODEL_CACHE
    generation_config: str = AUTO
    adapter: str | Path | None = None
    prefetch: Prefetch = "off"
    draft: str | Path | None = None
    mtp: bool = False
    prefetch_horizon: int = 1
    probe_depth: int = 1

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        if self.precision == AUTO_PRECISION and self.memory is None:
            raise ConfigError(
                "precision auto divides a memory budget among experts, but memory is not given; "
                "give memory, or a precision such as int4"
            )
        if self.placement is not None and self.precision != "native":
            raise ConfigError(
                f"a placement sets the formats of every block, and so does precision "
                f"{self.precision!r}; give one of the two"
            )
        if self.generation_config not in (AUTO, NONE, IGNORE):
            raise ConfigError(
                f"generation_config={self.generation_config!r} is not 'auto' (follow the "
                "model's generation_config.json), 'none' (take nothing but special tokens) or "
                "'ignore' (do not read it)"
            )
        self.formats()  # raises for unknown names
        self.dense_format()
        self._check_policies()
        for name in ("context", "readers", "sequences", "probe_depth"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}, but it is a whole number, 1 or more")
        if self.step_tokens is not None and (
            type(self.step_tokens) is not int or self.step_tokens < 1
        ):
            raise ConfigError(
                f"step_tokens={self.step_tokens!r}, but it is a whole number, 1 or more, or None"
            )
        if self.host_memory is not None and planned_device(self.device).type == "cpu":
            raise ConfigError(
                f"host_memory={self.host_memory!r}, but on a CPU the slots themselves are in host "
                "memory; give it to memory (--memory), or serve on a GPU (device cuda)"
            )
        check_host_compute(self.host_compute, on_cpu=planned_device(self.device).type == "cpu")
        self._check_kv_cache()
        if not self.half_life_tokens > 0:
            raise ConfigError(f"half_life_tokens={self.half_life_tokens!r} must be above zero")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"dtype={self.dtype!r} is not torch.float32, torch.bfloat16 or torch.float16"
            )

    def _check_policies(self) -> None:
        if self.eviction not in POLICIES:
            raise ConfigError(f"eviction {self.eviction!r} is not one of {', '.join(POLICIES)}")
        if self.prefetch not in get_args(Prefetch):
            known = ", ".join(get_args(Prefetch))
            raise ConfigError(f"prefetch={self.prefetch!r} is not one of {known}")
        horizon = self.prefetch_horizon
        if type(horizon) is not int or not 1 <= horizon <= MAX_HORIZON:
            raise ConfigError(
                f"prefetch_horizon={horizon!r}, but experts are read 1 to {MAX_HORIZON} layers "
                "ahead; give a whole number of these"
            )
        if horizon > 1 and self.prefetch == "off":
            raise ConfigError(
                f"prefetch_horizon={horizon}, but prefetch is off; give prefetch auto or on "
                "(--prefetch) too, or leave the horizon out"
            )

    def _check_kv_cache(self) -> None:
        if self.kv_cache not in KV_CACHES:
            raise ConfigError(f"kv_cache={self.kv_cache!r} is not one of {', '.join(KV_CACHES)}")
        if self.int8_cache and planned_device(self.device).type != "cpu":
            raise ConfigError(
                f"kv_cache int8 has kernels for CPUs only, but device is {self.device!r}; give "
                "kv_cache model, or device cpu"
            )

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are held as int8."""
        return self.kv_cache == INT8_CACHE

    def dense_format(self) -> GroupedFormat | None:
        """Return the format of dense weights; None if they are not encoded."""
        return parse_format(self.dense_precision).dense_format

    def keeps_dense_codes(self) -> bool:
        """Return whether linear layers of a quantised checkpoint stay in its own codes."""
        return parse_format(self.dense_precision) == NATIVE

    def format(self, block: MoeBlock) -> Format:
        """Return the format of a block's slots: a placement's largest, or auto's smallest."""
        if self.placement is not None:
            return self.placement[block.name].largest(block)
        return parse_format(AUTO_FORMATS[0] if self.precision == AUTO_PRECISION else self.precision)

    def formats(self, block: str | None = None) -> list[Format]:
        """Return all formats that slots of a block may get; of all blocks if None."""
        if self.placement is not None:
            placed = self.placement.values() if block is None else [self.placement[block]]
            names = {format.name: None for one in placed for format in one.distinct()}
            return [parse_format(name) for name in names]
        names = AUTO_FORMATS if self.precision == AUTO_PRECISION else (self.precision,)
        return [parse_format(name) for name in names]
