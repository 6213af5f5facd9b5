"""What commands that serve a model do alike: loading it in sight, saying what it takes, tables.

Knows nothing of how options are given (`options.py`).
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from moefit.api import folder_of, load
from moefit.cli.app import console, say
from moefit.cli.options import MemoryOptions, MissOptions
from moefit.cli.planned import NO_PLAN, PlanOptions, forbid_with_plan, in_a_line, say_packing
from moefit.cli.precision import resolve_precision
from moefit.engine.engine import PROMPT_LOGITS_BYTES
from moefit.errors import BudgetTooSmallError
from moefit.evaluate.bandwidth import Bandwidth
from moefit.evaluate.loading import ARCHITECTURES
from moefit.evaluate.speed import Speed
from moefit.moe.expert_dropout import ExpertDropoutRecord, dropout_record
from moefit.moe.routing import Rule
from moefit.plan.plan_file import Plan
from moefit.quant.backend import backend_status
from moefit.serve.config import NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import HUB_CODE, GenerationDefaults
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.load import Progress
from moefit.serve.memory.budget import PARTS, MemoryBudget, format_bytes
from moefit.serve.memory.estimate import InitialFormats, memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import PackedStore
from moefit.server.tokenizer import RENDER_RESIDENT

WHOLE_WINDOWS = 1 << 62
"""As `prompt_logits`: those of all tokens of the context, which `moefit eval` asks for at once."""
_CONCURRENCY = 16  # of `moefit serve`, unless it is given another


def load_served(
    model: str,
    room: MemoryOptions,
    misses: MissOptions,
    planned: PlanOptions = NO_PLAN,
    **settings: Any,
) -> ServedModel:
    """Load and say what it takes; `settings` as of `moefit.load`."""
    if planned.wanted:
        return load_planned(model, room, misses, planned, **settings)[0]
    room = resolve_precision(model, room, misses, **settings)
    if "sequences" not in settings:  # a server keeps the bound for when its mode is turned
        misses.refuse_vain()
    with loading() as progress:
        served = load(model, **room.settings(), **misses.settings(), **settings, progress=progress)
    _remark(served, model, room)
    return served


def load_planned(
    model: str, room: MemoryOptions, misses: MissOptions, planned: PlanOptions, **settings: Any
) -> tuple[ServedModel, Plan]:
    """By a plan, which decides mode and formats; the plan too.

    sequences, prompt_logits in `settings`: of a server, which a plan leaves room for.
    """
    encoded = {
        name: None if value == NATIVE_PRECISION else value
        for name, value in (("precision", room.experts), ("dense-precision", room.dense))
    }
    decided = {name: getattr(misses, name) for name in ("mode", "prefill", "bound")}
    forbid_with_plan(**decided, dtype=room.dtype, exact=room.exact or None, **encoded)
    with console.status("planning"):
        plan = planned.plan_for(model, room, settings.get("sequences"), settings.get("helpers", 0))
    say(f"plan: {in_a_line(plan)}")
    chosen = {"host_memory": room.host_memory, "device": room.device, **plan.settings(), **settings}
    if room.memory is not None:
        chosen["memory"] = room.memory
    with loading() as progress, _said_of(plan, chosen["sequences"]):
        served = load(model, **chosen, progress=progress)
    if plan.rule is not None:
        use_rule(served.model, Rule.parse(plan.rule))
    say_packing(plan, model)
    _remark(served, model, room)
    return served, plan


@contextmanager
def _said_of(plan: Plan, sequences: int) -> Iterator[None]:
    """Add what may be the reason if a plan does not fit."""
    try:
        yield
    except BudgetTooSmallError as error:
        if plan.sequences >= sequences:
            raise
        raise BudgetTooSmallError(
            f"{error}; it was planned for {plan.sequences} requests at once, and this server runs "
            f"{sequences}: plan with --max-concurrency {sequences}, or serve with less"
        ) from error


def _remark(served: ServedModel, model: str, room: MemoryOptions) -> None:
    """Say what it takes, and what would make it faster."""
    say(_summary(served, room.experts))
    if trained := dropout_line(dropout_record(served.model.config), served.policy.mode):
        say(trained)
    for remark in served.report()["packed_ignored"][:3]:
        say(f"note: {remark}")
    if "encoded" in served.report()["experts_from"]:
        dtype = f" --dtype {room.dtype}" if room.dtype else ""
        say(
            "note: experts are encoded each time they are read; faster once you have run: "
            f"moefit pack {shlex.quote(model)} --formats {room.to_pack}{dtype}"
        )


def dropout_line(record: ExpertDropoutRecord | None, mode: str | None = None) -> str:
    """Say which mode a model was trained for, and what fewer experts cost; empty if it was not.

    >>> record = ExpertDropoutRecord(order="nested", share=0.5, least=2, begin=0.0,
    ...     held_out_loss={8: 2.0, 4: 2.05})
    >>> dropout_line(record, "virtual")
    'trained with expert dropout (nested); perplexity on its held-out text: 4 of 8 experts +5.1%'
    >>> dropout_line(record, "exact").removeprefix(dropout_line(record, "virtual"))
    '; recommended: --mode virtual'
    """
    if record is None:
        return ""
    costs = record.costs()
    most = max(costs, default=0)
    parts = [
        f"{few} {cost:+.1%}" for few, cost in sorted(costs.items(), reverse=True) if few < most
    ]
    line = f"trained with expert dropout ({record.order})"
    if parts:
        first, *rest = parts
        first = first.replace(" ", f" of {most} experts ", 1)
        line += f"; perplexity on its held-out text: {', '.join([first, *rest])}"
    return line if mode == "virtual" else f"{line}; recommended: --mode virtual"


def say_generation(generation: GenerationDefaults, *, engine: bool = True) -> None:
    """Say what generation_config.json does to answers.

    engine: it is the engine that makes them, which does not follow all settings.
    """
    if given := generation.sampling():
        listed = ", ".join(f"{name} {value:g}" for name, value in given.items())
        say(
            f"from the model's generation_config.json, where nothing else is asked: {listed} "
            "(--generation-config none leaves them out)"
        )
    if generation.suppressed:
        say("note: the model's generation_config.json suppresses tokens, and none of them is made")
    unfollowed = [name for name in generation.unfollowed if engine or name in HUB_CODE]
    if unfollowed:
        say(
            f"note: not followed from the model's generation_config.json: "
            f"{', '.join(unfollowed)}; answers may differ from those of transformers"
        )


def is_served(model: str, *asked: MemoryOptions | MissOptions | PlanOptions) -> bool:
    """Whether a model is loaded as for serving, in a budget or with everything in memory.

    The others, DS-MoE and OLMoE without a budget, are computed by their own modules, in which the
    inference rule may change from text to text. A damaged configuration is theirs to report.
    """
    if any(one.wanted for one in asked):
        return True
    try:
        config = json.loads((folder_of(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") not in ARCHITECTURES


def shared_steps(requests: int | None) -> dict[str, Any]:
    """What so many requests that share steps take, as settings of `moefit.load`; None: no server.

    >>> shared_steps(None)
    {}
    """
    if requests is None:
        return {}
    return {
        "sequences": requests,
        "prompt_logits": PROMPT_LOGITS_BYTES,
        "helpers": RENDER_RESIDENT,
    }


def import_serving_commands() -> None:
    """Import all commands that serve, so that this process takes as much memory as theirs.

    An estimate starts from what this process holds, and the modules of a server take 20 MiB.
    """
    for name in ("chat", "evaluate", "serve"):
        import_module(f"moefit.cli.{name}")


def minimums(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore, budget: MemoryBudget
) -> dict[str, int]:
    """Return the least budget of each command that serves, with these settings.

    Args:
        skeleton: Of the model.
        settings: Those that are the same for all; what a command has beside them is added.
        packed: The packed experts that there are.
        budget: Of these settings; the process counts for all commands as it was measured for it.
    """
    requests = _CONCURRENCY if settings.sequences == 1 else settings.sequences
    server = shared_steps(requests)
    own: dict[str, dict[str, Any]] = {
        "generate": {},
        "bench": {},
        "chat": {"helpers": RENDER_RESIDENT},
        "eval": {"prompt_logits": WHOLE_WINDOWS},
        "serve": server,
    }
    alone = replace(settings, memory=None, **{**dict.fromkeys(server, 0), "sequences": 1})
    floors: dict[str, int] = {}
    for command, more in own.items():
        one = memory_budget(skeleton, replace(alone, **more), packed)
        measured = budget.process - settings.helpers + one.slack - budget.slack
        floors[command] = replace(one, process=measured + more.get("helpers", 0)).min_bytes
    return floors


def minimums_line(floors: Mapping[str, int], settings: LoadSettings) -> str:
    """Say the least budgets in a line, in bytes that --memory takes."""
    requests = _CONCURRENCY if settings.sequences == 1 else settings.sequences
    words = {"serve": f"serve --max-concurrency {requests}"}
    parts = ", ".join(f"{words.get(name, name)} {size}" for name, size in floors.items())
    return f"least --memory with --context {settings.context}: {parts}"


@contextmanager
def loading() -> Iterator[Progress]:
    """A line that says what is being loaded, and how far that is; gone at the end."""
    columns = (
        SpinnerColumn(),
        TextColumn("loading{task.fields[what]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, what="", done="")

        def show(what: str, done: int, total: int) -> None:
            count = f"{done:,} of {total:,}"
            bar.update(task, completed=done, total=total, what=f" {what}", done=count)

        yield show


def _summary(served: ServedModel, precision: str) -> str:
    report = served.report()
    slots, experts = sum(report["slots"].values()), sum(report["experts"].values())
    total = served.budget.total
    room = "no budget" if total is None else f"a budget of {format_bytes(total)}"
    native = precision == NATIVE_PRECISION
    lying = "" if native else f", experts in {_precision(report)}, {report['experts_from']}"
    kernels = f", kernels: {backend_status(served.model.device)}"
    return (
        f"{type(served.model).__name__} in {room}: {slots:,} slots for {experts:,} experts, "
        f"mode {report['mode']}{lying}{kernels}"
    )


def _precision(report: dict[str, Any]) -> str:
    """Formats of slots, with how many there are of each if they differ."""
    total: Counter[str] = Counter()
    for counts in report["formats"].values():
        total.update(counts)
    return next(iter(total)) if len(total) == 1 else _counted(total)


def _counted(formats: Mapping[str, int]) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in sorted(formats.items()))


def _in(precision: str) -> str:
    return "" if precision == NATIVE_PRECISION else f" in {precision}"


def ledger_table(budget: MemoryBudget, start: InitialFormats, title: str) -> Table:
    """Bytes by part, then slots, with what they begin with, and what the sums are."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, meaning in PARTS.items():
        size = getattr(budget, name)
        table.add_row(meaning, f"{size:,}", format_bytes(size))
    counts = budget.slots()
    experts = sum(block.num_experts for block in budget.blocks)
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
    table.add_row(
        f"{sum(counts):,} slots for {experts:,} experts ({spread} a block)",
        f"{start.nbytes:,}",
        format_bytes(start.nbytes),
    )
    if start.smallest != NATIVE_PRECISION:
        table.add_row(f"  {_counted(start.formats)}: {start.bits_per_weight:.2f} bits a weight")
    table.add_section()
    everything = f"all experts{_in(start.smallest)}"
    rows = {
        "sum": budget.fixed + start.nbytes,
        "floor": budget.min_bytes,
        everything: budget.all_resident_bytes,
        **{f"all experts in {name}": size for name, size in budget.all_resident_bytes_in().items()},
    }
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
