"""Options of commands that serve a model inside a memory budget, and what those commands print."""

import shlex
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from moefit.api import load
from moefit.cli.app import console, say
from moefit.cli.planned import NOTHING_PLANNED, Planned, refuse_beside_plan, say_packing
from moefit.evaluate.speed import Bandwidth, Speed
from moefit.formats.format import FORMATS
from moefit.formats.kernels import status
from moefit.plan.report import in_a_line
from moefit.plan.running import use_rule
from moefit.serve.budget import PARTS, MemoryBudget, format_bytes
from moefit.serve.served import ServedModel
from moefit.serve.settings import AUTO_PRECISION
from moefit.serve.upgrades import AUTO


class ModeName(StrEnum):
    """What happens when an expert is not resident."""

    exact = "exact"
    bounded = "bounded"
    virtual = "virtual"


class BaselineName(StrEnum):
    """Fixed resident sets to compare with."""

    norm = "norm"
    frequency = "frequency"
    importance = "importance"
    random = "random"


Memory = Annotated[
    str | None,
    typer.Option(
        help="serve inside this budget, such as 4.7GiB: every byte of the process on the device"
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="on a GPU: the most host memory that experts may take between disk and it"),
]
ModeOption = Annotated[
    ModeName | None,
    typer.Option(
        "--mode",
        help="exact: fetch what is missing; bounded: substitute a little; virtual: SwapMoE",
    ),
]
Prefill = Annotated[
    ModeName | None, typer.Option(help="mode of prompts; exact, but virtual where the mode is")
]
Bound = Annotated[
    float, typer.Option(min=0, max=1, help="bounded: share of router weight that may go elsewhere")
]
Precision = Annotated[
    str,
    typer.Option(
        help="format of experts in memory: "
        + ", ".join(name for name in FORMATS if not name.endswith("nearest"))
        + ", or auto: each expert the one that it deserves within --memory"
    ),
]
NATIVE_PRECISION = "native"
Rest = Annotated[str, typer.Option(help="the same for the weights that are no experts; not auto")]
Context = Annotated[int, typer.Option(min=1, help="tokens that the KV cache is reserved for")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The options as given."""

    memory: str | None
    host_memory: str | None
    mode: ModeName | None
    prefill: ModeName | None
    bound: float
    context: int
    device: str
    precision: str = NATIVE_PRECISION
    rest: str = NATIVE_PRECISION
    dtype: torch.dtype | None = None
    planned: Planned = NOTHING_PLANNED

    @property
    def wanted(self) -> bool:
        """Whether anything asks for a budget, a mode, a format or a plan."""
        asked = not (self.memory is self.host_memory is self.mode is None) or self.planned.wanted
        return asked or {self.precision, self.rest} != {NATIVE_PRECISION}

    @property
    def _to_pack(self) -> str:
        return ",".join(AUTO[:-1]) if self.precision == AUTO_PRECISION else self.precision

    def load(self, model: str, **settings: Any) -> ServedModel:
        """Load and say what it takes; `settings` as of `moefit.load`."""
        if self.planned.wanted:
            return self._load_planned(model, **settings)
        policy: dict[str, Any] = {"bound": self.bound}
        if self.prefill is not None:
            policy["prefill"] = self.prefill.value
        with console.status("loading"):
            served = load(
                model,
                memory=self.memory,
                host_memory=self.host_memory,
                mode=(self.mode or ModeName.exact).value,
                device=self.device,
                context=self.context,
                precision=self.precision,
                rest=self.rest,
                dtype=self.dtype,
                **policy,
                **settings,
            )
        self._remark(served, model)
        return served

    def _load_planned(self, model: str, **settings: Any) -> ServedModel:
        """By a plan, which decides mode and formats."""
        formats = [
            None if name == NATIVE_PRECISION else name for name in (self.precision, self.rest)
        ]
        refuse_beside_plan(
            mode=self.mode, prefill=self.prefill, precision=formats[0], rest=formats[1]
        )
        with console.status("planning"):
            plan = self.planned.plan_for(model, self.memory, self.context, self.device)
        say(f"plan: {in_a_line(plan)}")
        chosen = plan.settings()
        if self.memory is not None:
            chosen["memory"] = self.memory
        with console.status("loading"):
            served = load(
                model, host_memory=self.host_memory, device=self.device, **{**settings, **chosen}
            )
        use_rule(served, plan.rule)
        say_packing(plan, model)
        self._remark(served, model)
        return served

    def _remark(self, served: ServedModel, model: str) -> None:
        """Say what it takes, and what would make it faster."""
        say(_summary(served, self.precision))
        for remark in served.report()["packed_ignored"][:3]:
            say(f"note: {remark}")
        if "encoded" in served.report()["experts_from"]:
            dtype = f" --dtype {str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
            say(
                "note: experts are encoded each time they are read; faster once you have run: "
                f"moefit pack {shlex.quote(model)} --formats {self._to_pack}{dtype}"
            )


def _summary(served: ServedModel, precision: str) -> str:
    report = served.report()
    slots, experts = sum(report["slots"].values()), sum(report["experts"].values())
    total = served.budget.total
    room = "no budget" if total is None else f"a budget of {format_bytes(total)}"
    native = precision == NATIVE_PRECISION
    lying = "" if native else f", experts in {_precision(report)}, {report['experts_from']}"
    kernels = f", kernels: {status()}" if served.model.device.type == "cpu" else ""
    return (
        f"{type(served.model).__name__} in {room}: {slots:,} slots for {experts:,} experts, "
        f"mode {report['mode']}{lying}{kernels}"
    )


def _precision(report: dict[str, Any]) -> str:
    """Formats of slots, with how many there are of each if they differ."""
    total: Counter[str] = Counter()
    for counts in report["formats"].values():
        total.update(counts)
    if len(total) == 1:
        return next(iter(total))
    return " + ".join(f"{count:,} {name}" for name, count in sorted(total.items()))


def ledger_table(budget: MemoryBudget, title: str) -> Table:
    """Bytes by part, then slots by block."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, meaning in PARTS.items():
        size = getattr(budget, name)
        table.add_row(meaning, f"{size:,}", format_bytes(size))
    counts = budget.slots()
    in_slots = budget.with_slots(counts) - budget.fixed
    experts = sum(block.num_experts for block in budget.blocks)
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
    table.add_row(
        f"{sum(counts):,} slots for {experts:,} experts ({spread} a block)",
        f"{in_slots:,}",
        format_bytes(in_slots),
    )
    table.add_section()
    rows = {"sum": budget.fixed + in_slots, "floor": budget.floor, "all experts": budget.everything}
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", format_bytes(size))
    if budget.host is not None:
        table.add_section()
        table.add_row(
            "host memory, beside the budget", f"{budget.host:,}", format_bytes(budget.host)
        )
    return table


def speed_table(speed: Speed, bandwidth: Bandwidth, title: str) -> Table:
    """Two columns: what was measured, and its value."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("decoding one sequence", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    rows = {
        "tokens/s": f"{speed.tokens_per_second:.2f}",
        "ceiling (storage, memory bandwidth)": f"{speed.ceiling:.2f}",
        "seconds a token: median, 95%, worst": f"{speed.median_seconds:.4f}, "
        f"{speed.p95_seconds:.4f}, {speed.worst_seconds:.4f}",
        f"prefill of {speed.prompt_tokens} tokens, tokens/s": (
            f"{speed.prefill_tokens_per_second:.2f}"
        ),
        "experts found in memory": f"{speed.hit_rate:.1%}",
        "router weight moved": f"{speed.substituted_mass:.1%}",
        "swaps": f"{speed.swaps:,}",
        "read from storage a token": format_bytes(speed.bytes_read_per_token),
        "storage, memory bandwidth": f"{format_bytes(bandwidth.storage)}/s, "
        f"{format_bytes(bandwidth.memory)}/s",
        "peak of the process": format_bytes(speed.peak_process_bytes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
