"""How to serve a model: what `moefit.load` takes, beside the policy of its modes.

Owns the fields, their defaults, what each may hold, and which formats they ask for.
"""

from dataclasses import dataclass, field

import torch

from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.formats.format import NATIVE, Format, GroupedFormat, parse_format
from moefit.moe.families import MoeBlock
from moefit.serve.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.generation import AUTO as AUTO_GENERATION
from moefit.serve.generation import NONE as NO_GENERATION
from moefit.serve.ladders import AUTO
from moefit.serve.manager import VirtualExpertManager
from moefit.serve.placement import Placement
from moefit.serve.policy import Mode, check_refetch

AUTO_PRECISION, NATIVE_PRECISION = "auto", NATIVE.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to serve. `context` is how many tokens the KV cache is reserved for, over all sequences.

    host_memory: on a GPU, the most that experts may take of host memory on their way from storage
    to slots, where they then can be found again; None is a buffer a reader.
    eviction: which resident makes room in the exact and bounded modes (`serve/eviction.py`).
    dtype None: the checkpoint's own. precision: the format of experts in memory, such as int4
    (`formats/format.py`); native is the checkpoint's own, and auto gives each expert the one that
    it deserves within the budget. rest: the same for the weights that are no experts, but routers
    and vectors; they are in memory as they are while they are being encoded.
    placement: slots and formats block by block, instead of equal shares in one precision.
    refetch: with precision auto in the exact mode, the share of a token's router weight from which
    on an expert is computed from a better copy (see `Policy`); room for copies is reserved.
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
    rest: str = NATIVE_PRECISION
    dtype: torch.dtype | None = None
    readers: int = 4
    half_life_tokens: float = 24.0
    manager: VirtualExpertManager = field(default_factory=VirtualExpertManager)
    placement: Placement | None = None
    sequences: int = 1
    prompt_logits: int = 0
    helpers: int = 0
    refetch: float | None = None
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
        self._check_refetch()
        if self.generation_config not in (AUTO_GENERATION, NO_GENERATION):
            raise ConfigError(
                f"generation_config={self.generation_config!r} is neither 'auto' (follow the "
                "model's generation_config.json) nor 'none' (take nothing but special tokens)"
            )
        self.formats()  # these refuse names that do not exist
        self.rest_format()
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

    def _check_refetch(self) -> None:
        check_refetch(self.refetch)
        if self.refetch is None:
            return
        if self.precision != AUTO_PRECISION:
            raise ConfigError(
                f"refetch={self.refetch!r} reads experts again in a better format than their "
                f"slots', and with precision {self.precision!r} all have the same; give precision "
                "auto, or leave refetch out"
            )
        if self.mode != "exact":
            raise ConfigError(
                f"refetch={self.refetch!r} belongs to mode exact, and the mode is {self.mode!r}; "
                "give one of the two"
            )

    def rest_format(self) -> GroupedFormat | None:
        """Of the weights that are no experts; None if they stay as they are."""
        format = parse_format(self.rest)
        return format if isinstance(format, GroupedFormat) else None

    def format(self, block: MoeBlock) -> Format:
        """Of a block's slots; where they differ the largest, and of `auto` where they begin."""
        if self.placement is not None:
            return self.placement[block.name].largest(block)
        return parse_format(AUTO[0] if self.precision == AUTO_PRECISION else self.precision)

    def formats(self, block: str | None = None) -> list[Format]:
        """All that a slot may come to have; of one block, or of any."""
        if self.placement is not None:
            some = self.placement.values() if block is None else [self.placement[block]]
            names = {format.name: None for one in some for format in one.distinct()}
            return [parse_format(name) for name in names]
        names = AUTO if self.precision == AUTO_PRECISION else (self.precision,)
        return [parse_format(name) for name in names]
