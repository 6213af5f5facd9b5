"""Configuration of a served model: load settings, the policy for misses, and placements.

`LoadSettings` is what `moefit.load` takes, `Policy` says what happens when an expert is not
resident, and a `Placement` gives slots and formats block by block, as the planner writes them.
All are frozen and check themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard, get_args

import torch

from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.moe.families import MoeBlock
from moefit.quant.format import NATIVE, Format, GroupedFormat, parse_format
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.hf.generation_config import AUTO as AUTO_GENERATION
from moefit.serve.hf.generation_config import NONE as NO_GENERATION
from moefit.serve.precision.allocate import AUTO_FORMATS

Mode = Literal["exact", "bounded", "virtual"]
Update = Literal["manager", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What happens when an expert is not resident. One for all blocks, changed as a whole.

    - `mode` for steps of one token a sequence, `prefill` for longer ones.
    - bounded: at most `bound` of a token's router weight is substituted, never its `protected`
      best experts.
    - `ramp` spreads the bound over the depth, for what goes wrong early goes on through all blocks
      behind: 0 is `bound` everywhere, 1 from nothing in front to twice as much at the end.
    - `keep_mass` scales a token's changed weights to the sum of the router's own choice; where a
      family normalises its weights, that is so anyway.
    - `residency` fixed keeps the resident set as it is, so that evaluation can be repeated: what
      is fetched then goes when the step ends.
    """

    mode: Mode = "exact"
    prefill: Mode = "exact"
    bound: float = 0.3
    ramp: float = 1.0
    protected: int = 1
    residency: Update = "manager"
    keep_mass: bool = True

    def changed(self, mode: Mode, **settings: Any) -> "Policy":
        """This policy in another mode, with any other of its settings changed.

        `prefill` follows the mode unless given: virtual prefills virtually, the others exactly.
        Raises ConfigError for an unknown setting or value.
        """
        settings.setdefault("prefill", "virtual" if mode == "virtual" else "exact")
        try:
            policy = replace(self, mode=mode, **settings)
        except TypeError as error:
            known = ", ".join(Policy.__slots__)
            raise ConfigError(f"{sorted(settings)}: unknown setting; there are {known}") from error
        policy.check()
        return policy

    def check(self) -> None:
        """Raise ConfigError for a value that does not exist or cannot be."""
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
        """The bound of a block at `depth`, 0 to 1; over all blocks its mean is `bound`.

        >>> Policy(bound=0.25, ramp=1.0).bound_at(0.75)
        0.375
        """
        return min(1.0, self.bound * (1 + self.ramp * (2 * depth - 1)))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlacement:
    """One block: its slots, and one format for all of them, or one for each expert.

    Formats by expert need a slot for each expert, which then stays where it is.
    """

    slots: int
    formats: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether every expert has its own slot, of its own format."""
        return len(self.formats) > 1

    def format_of(self, expert: int) -> Format:
        """The format that an expert lies in when it is in memory."""
        return parse_format(self.formats[expert if self.by_expert else 0])

    def distinct(self) -> tuple[Format, ...]:
        """Its formats, each once."""
        return tuple(parse_format(name) for name in dict.fromkeys(self.formats))

    def largest(self, block: MoeBlock) -> Format:
        """The format whose slots are the largest."""
        return max(self.distinct(), key=lambda format: format.nbytes(block.layout.specs))

    def nbytes(self, block: MoeBlock) -> int:
        """Bytes of its slots."""
        specs = block.layout.specs
        if not self.by_expert:
            return self.slots * self.distinct()[0].nbytes(specs)
        sizes = {format.name: format.nbytes(specs) for format in self.distinct()}
        return sum(sizes[name] for name in self.formats)


Placement = Mapping[str, BlockPlacement]
"""By block name."""


def check_placement(placement: Placement, blocks: Sequence[MoeBlock]) -> None:
    """Raise ConfigError if it is not one of these blocks, or cannot be."""
    if set(placement) != {block.name for block in blocks}:
        known = [block.name for block in blocks]
        odd = sorted(set(placement).symmetric_difference(known))
        raise ConfigError(
            f"a placement of {len(placement)} blocks does not fit a model with {len(known)} of "
            f"them; they differ in {', '.join(odd[:3])}; plan again for this model"
        )
    for block in blocks:
        _check_block(placement[block.name], block)


def _check_block(one: BlockPlacement, block: MoeBlock) -> None:
    if type(one.slots) is not int or not 1 <= one.slots <= block.num_experts:
        raise ConfigError(
            f"{block.name} is given {one.slots!r} slots, but it has {block.num_experts} experts: "
            f"give 1 to {block.num_experts}"
        )
    one.distinct()  # refuse what does not exist
    wanted = 1 if one.slots < block.num_experts else block.num_experts
    if len(one.formats) not in (1, wanted):
        raise ConfigError(
            f"{block.name} is given {len(one.formats)} formats for {one.slots} slots and "
            f"{block.num_experts} experts; give one format, or one for each expert where every "
            "expert has a slot"
        )


AUTO_PRECISION, NATIVE_PRECISION = "auto", NATIVE.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to serve. `context` is how many tokens the KV cache is reserved for, over all sequences.

    host_memory: on a GPU, the most that experts may take of host memory on their way from storage
    to slots, where they then can be found again; None is a buffer a reader.
    eviction: which resident makes room in the exact and bounded modes (`serve/cache/eviction.py`).
    dtype None: the checkpoint's own. precision: the format of experts in memory, such as int4
    (`quant/format.py`); native is the checkpoint's own, and auto gives each expert the one that
    it deserves within the budget. dense_precision: the same for dense
    weights, except routers and vectors; they are in memory as they are while being encoded.
    placement: slots and formats block by block, instead of equal shares in one precision.
    sequences: how many a step may give logits of; prompt_logits: the most bytes of a prompt's own
    logits in a step, where they are asked for. helpers: bytes of other processes that serve
    together with this one, which count against the budget too.
    generation_config: `auto` follows the checkpoint's generation_config.json, `none` takes nothing
    but special tokens from it.
    """

    memory: str | int | None = None
    host_memory: str | int | None = None
    mode: Mode = "exact"
    device: str = "cpu"
    context: int = 2048
    eviction: str = DEFAULT_POLICY
    precision: str = NATIVE_PRECISION
    dense_precision: str = NATIVE_PRECISION
    dtype: torch.dtype | None = None
    readers: int = 4
    half_life_tokens: float = 24.0
    manager: VirtualExpertManager = field(default_factory=VirtualExpertManager)
    placement: Placement | None = None
    sequences: int = 1
    prompt_logits: int = 0
    helpers: int = 0
    generation_config: str = AUTO_GENERATION

    def check(self) -> None:
        """Raise ConfigError for a value that does not exist or cannot be."""
        if self.precision == AUTO_PRECISION and self.memory is None:
            raise ConfigError(
                "precision auto divides a memory budget among experts, and memory is not given; "
                "give memory, or a precision such as int4"
            )
        if self.placement is not None and self.precision != "native":
            raise ConfigError(
                f"a placement gives every block its formats, and so does precision "
                f"{self.precision!r}; give one of the two"
            )
        if self.generation_config not in (AUTO_GENERATION, NO_GENERATION):
            raise ConfigError(
                f"generation_config={self.generation_config!r} is neither 'auto' (follow the "
                "model's generation_config.json) nor 'none' (take nothing but special tokens)"
            )
        self.formats()  # these refuse names that do not exist
        self.dense_format()
        if self.eviction not in POLICIES:
            raise ConfigError(f"eviction {self.eviction!r} is not one of {', '.join(POLICIES)}")
        for name in ("context", "readers", "sequences"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}, but it is a whole number, 1 or more")
        if self.host_memory is not None and planned_device(self.device).type == "cpu":
            raise ConfigError(
                f"host_memory={self.host_memory!r}, but on a CPU the slots themselves are in host "
                "memory; give it to memory (--memory), or serve on a GPU (device cuda)"
            )
        if not self.half_life_tokens > 0:
            raise ConfigError(f"half_life_tokens={self.half_life_tokens!r} must be above zero")
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"dtype={self.dtype!r} is not torch.float32, torch.bfloat16 or torch.float16"
            )

    def dense_format(self) -> GroupedFormat | None:
        """Of the weights that are no experts; None if they stay as they are."""
        return parse_format(self.dense_precision).dense_format

    def format(self, block: MoeBlock) -> Format:
        """Of a block's slots; where they differ the largest, and of `auto` where they begin."""
        if self.placement is not None:
            return self.placement[block.name].largest(block)
        return parse_format(AUTO_FORMATS[0] if self.precision == AUTO_PRECISION else self.precision)

    def formats(self, block: str | None = None) -> list[Format]:
        """All that a slot may come to have; of one block, or of any."""
        if self.placement is not None:
            some = self.placement.values() if block is None else [self.placement[block]]
            names = {format.name: None for one in some for format in one.distinct()}
            return [parse_format(name) for name in names]
        names = AUTO_FORMATS if self.precision == AUTO_PRECISION else (self.precision,)
        return [parse_format(name) for name in names]
