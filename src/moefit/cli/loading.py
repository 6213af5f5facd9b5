"""What commands that serve a model share: loading with a progress bar, summaries and tables."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from moefit.api import draft_folder_of, folder_of, load
from moefit.cli.app import console, logs_json, say, status
from moefit.cli.options import KvCache, PrefetchName, ServingOptions
from moefit.cli.planned import forbid_with_plan, in_a_line, plan_for, say_packing
from moefit.cli.precision import resolve_precision
from moefit.engine.api import EngineSettings
from moefit.engine.engine import PROMPT_LOGITS_BYTES
from moefit.engine.speculation.drafts import LOOKUP_BYTES, MAX_STEP_DRAFTS, Speculate
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.evaluate.bandwidth import Bandwidth
from moefit.evaluate.loading import computed_whole
from moefit.evaluate.speed import Speed
from moefit.host import processors
from moefit.moe.expert_dropout import ExpertDropoutRecord, dropout_record
from moefit.moe.routing import Rule
from moefit.plan.plan_file import Plan
from moefit.quant.backend import backend_status
from moefit.serve.config import NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import HUB_CODE, GenerationDefaults
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.load import Progress
from moefit.serve.memory.activations import KERNEL_FIRST_USE
from moefit.serve.memory.budget import PARTS, MemoryBudget, format_bytes, part_label
from moefit.serve.memory.estimate import InitialFormats, draft_bytes, memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import PackedStore
from moefit.serve.prediction.prefetch import PREGATED, PREVIOUS, PROBES
from moefit.server.tokenizer import RENDER_RESIDENT

WHOLE_WINDOWS = 1 << 62
"""As `prompt_logits`: those of all tokens of the context, which `moefit eval` computes at once."""
CHAT_ENGINE = EngineSettings(max_concurrency=1)
_CONCURRENCY = 16  # of `moefit serve`, unless it is given another


def load_served(model: str, options: ServingOptions, **settings: Any) -> ServedModel:
    """Load a model and say what it takes.

    Args:
        model: As on the command line.
        options: Memory, precision, mode and plan.
        settings: Further keyword arguments of `moefit.load`.
    """
    if options.has_plan:
        return load_planned(model, options, **settings)[0]
    options = resolve_precision(model, options, **settings)
    if "sequences" not in settings:  # a server's mode may change later
        options.check_bound()
    how = {**options.load_settings(), **options.mode_settings(), **settings}
    how.setdefault("prefetch", options.prefetch.value)
    how.setdefault("prefetch_horizon", options.prefetch_horizon)
    with loading() as progress:
        served = load(model, **how, progress=progress)
    _say_summary(served, model, options)
    return served


def load_planned(model: str, options: ServingOptions, **settings: Any) -> tuple[ServedModel, Plan]:
    """Load a model by a plan, which decides mode and formats; return the plan too.

    Args:
        model: As on the command line.
        options: With a plan or a target.
        settings: Further keyword arguments of `moefit.load`.
    """
    dense = None if options.dense == NATIVE_PRECISION else options.dense
    if options.adapter is not None:
        raise ConfigError(
            f"--adapter {options.adapter}: plans predict the loss of the model without an adapter; "
            "give --memory with --precision or --mode instead of --plan, --max-loss and "
            "--min-speed, or merge the adapter with peft and plan for that model"
        )
    forbid_with_plan(
        mode=options.mode,
        prefill=options.prefill,
        bound=options.bound,
        dtype=options.dtype,
        exact=options.exact or None,
        precision=None if options.experts == NATIVE_PRECISION else options.experts,
        **{"dense-precision": dense},
    )
    if settings.get("mtp"):
        raise ConfigError(
            "--speculate mtp: a plan has no memory for the experts of the layer for multi-token "
            "prediction; with --plan, --max-loss or --min-speed, use --speculate ngram or "
            "draft:MODEL"
        )
    with status("planning"):
        drafts = settings.get("draft_rows", 0)
        rows = settings["sequences"] + drafts if "sequences" in settings else None
        helpers = settings.get("helpers", 0) + _planned_draft(model, options, settings)
        plan = plan_for(model, options, rows, helpers, settings.get("step_tokens"))
    say(f"plan: {in_a_line(plan)}")
    device = {
        "host_memory": options.host_memory,
        "host_compute": options.host_compute.value,
        "device": options.device,
    }
    whole = {
        "step_tokens": None,
        "prefetch": options.prefetch.value,
        "prefetch_horizon": options.prefetch_horizon,
    }
    chosen = {**device, **plan.settings(), **whole, **settings}
    if options.kv_cache is KvCache.int8:  # also for a plan that reserves for the model's dtype
        chosen["kv_cache"] = options.kv_cache.value
    if options.memory is not None:
        chosen["memory"] = options.memory
    with loading() as progress, _explain_plan(plan, chosen, drafts):
        served = load(model, **chosen, progress=progress)
    if plan.rule is not None:
        use_rule(served.model, Rule.parse(plan.rule))
    say_packing(plan, model)
    _say_summary(served, model, options)
    return served, plan


def _planned_draft(model: str, options: ServingOptions, settings: Mapping[str, Any]) -> int:
    """Return the bytes of the draft model, which planning knows nothing of."""
    if settings.get("draft") is None:
        return 0
    own = LoadSettings(
        draft=settings["draft"],
        device=options.device,
        context=options.context,
        dtype=build_skeleton(folder_of(model)).dtype,  # of the plan, and then of the draft model
        sequences=settings["sequences"],
    )
    return draft_bytes(own, KERNEL_FIRST_USE)


@contextmanager
def _explain_plan(plan: Plan, chosen: Mapping[str, Any], drafts: int) -> Iterator[None]:
    """Add to the error of a plan that does not fit what it was made for, if that is less.

    Args:
        plan: The plan.
        chosen: Settings of `moefit.load`.
        drafts: Drafted tokens of a step.
    """
    try:
        yield
    except BudgetTooSmallError as error:
        sequences, step, planned = (
            chosen["sequences"] + drafts,
            chosen["step_tokens"],
            plan.step_tokens,
        )
        if sequences > plan.sequences:
            why = (
                f"it was planned for {plan.sequences} requests at once, and this server runs "
                f"{sequences}: plan with --max-concurrency {sequences}, or serve with less"
            )
        elif planned is None or (step is not None and step <= planned):
            raise
        elif step is None:
            why = (
                f"it was planned for steps of {planned} tokens, as servers compute, and here "
                "prompts are computed whole: plan without --max-concurrency and --step-tokens"
            )
        else:
            why = (
                f"it was planned for steps of {planned} tokens, and this server computes {step}: "
                f"plan with --step-tokens {step}, or serve with a smaller --prefill-chunk"
            )
        raise BudgetTooSmallError(f"{error}; {why}") from error


def _say_summary(served: ServedModel, model: str, options: ServingOptions) -> None:
    """Say what the model takes, and what would make it faster."""
    say(_summary(served, options))
    obstacle = served.report()["prefetch"]["obstacle"]
    if served.prefetching.setting == PREGATED and not obstacle:
        early = "all layers are known before a token is computed, and read from then on"
        if served.report()["prefetch"]["predictor"] != PREVIOUS:
            early = "each layer are read while the layer before is computed"
        say(f"pre-gated: the experts of {early}")
    elif obstacle and options.prefetch is not PrefetchName.off:
        say(f"note: --prefetch {options.prefetch.value} has no effect: {obstacle}")
    elif served.prefetching.predictor is not None:
        say(prediction_line(served.report()["prefetch"]))
    if ignored := served.prefetching.probes.ignored:
        say(f"note: {ignored}")
    if trained := dropout_line(dropout_record(served.model.config), served.policy.mode):
        say(trained)
    for remark in served.report()["packed_ignored"][:3]:
        say(f"note: {remark}")
    _say_what_packing_gains(served.report(), model, options)


def _say_what_packing_gains(report: Mapping[str, Any], model: str, options: ServingOptions) -> None:
    dtype = f" --dtype {options.dtype}" if options.dtype else ""
    if "encoded" in report["experts_from"]:
        say(
            "note: experts are encoded each time they are read; faster once you have run: "
            f"moefit pack {shlex.quote(model)} --formats {options.to_pack}{dtype}"
        )
    if "encoded" in report["dense_from"] and not options.adapter:  # an adapter changes them
        say(
            "note: dense weights are encoded at each start; faster and in less memory once you "
            f"have run: moefit pack {shlex.quote(model)} --dense-formats {options.dense}{dtype}"
        )
    if nbytes := report["unpacked_bytes"]:
        say(f"note: {packing_line(model, nbytes, options.dtype)}")


def packing_line(model: str, nbytes: int, dtype: str | None) -> str:
    """Return how to make reading a checkpoint's own codes faster.

    Args:
        model: As on the command line.
        nbytes: What packing writes.
        dtype: As on the command line.
    """
    more = f" --dtype {dtype}" if dtype else ""
    return (
        "experts are read from several places of the checkpoint; in one read each once you have "
        f"run: moefit pack {shlex.quote(model)} --formats {NATIVE_PRECISION}{more} "
        f"({format_bytes(nbytes)} of storage)"
    )


def prediction_line(prefetch: Mapping[str, Any]) -> str:
    """Say what predicts the experts that are read early.

    >>> about = {"text": "a.txt", "number": 15, "bytes": 4 << 20, "recall": 0.9,
    ...     "next_router_recall": 0.8}
    >>> prediction_line({"predictor": "probes", "probes": about, "horizon": 1})
    'prefetching: 15 probes fitted on a.txt (4.00 MiB) find 90% of the experts, the next router 80%'
    >>> prediction_line({"predictor": "next router", "probes": None, "horizon": 1})
    "prefetching: the next layer's router predicts experts; `moefit pack --probes` fits probes"
    >>> print(prediction_line({"predictor": "probes", "probes": about, "horizon": 3}))
    prefetching up to 3 layers ahead: 15 probes fitted on a.txt (4.00 MiB) find 90% of the experts \
one layer ahead, the next router 80%
    """
    about, horizon = prefetch["probes"], prefetch["horizon"] or 1
    reach = "" if horizon == 1 else f" up to {horizon} layers ahead"
    if prefetch["predictor"] != PROBES:
        hint = "" if about else "; `moefit pack --probes` fits probes"
        whose = (
            "the next layer's router predicts" if horizon == 1 else "these layers' routers predict"
        )
        return f"prefetching{reach}: {whose} experts{hint}"
    found, routers = about["recall"], about["next_router_recall"]
    line = f"prefetching{reach}: {about['number']} probes fitted on {about['text']} ("
    line += f"{format_bytes(about['bytes'])})"
    if found is not None:
        line += f" find {found:.0%} of the experts{' one layer ahead' * (horizon > 1)}"
    return line if routers is None else f"{line}, the next router {routers:.0%}"


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
    """Say how generation_config.json changes what is generated.

    Args:
        generation: What was read from it.
        engine: The engine generates, which does not implement all settings.
    """
    if given := generation.sampling():
        listed = ", ".join(f"{name} {value:g}" for name, value in given.items())
        say(
            f"sampling defaults from the model's generation_config.json: {listed} "
            "(--generation-config none ignores them)"
        )
    if generation.suppressed:
        say("note: the model's generation_config.json suppresses some tokens")
    unfollowed = [name for name in generation.unfollowed if engine or name in HUB_CODE]
    if unfollowed:
        say(
            f"note: not followed from the model's generation_config.json: "
            f"{', '.join(unfollowed)}; answers may differ from those of transformers"
        )


def is_served(model: str, options: ServingOptions) -> bool:
    """Return whether a model is loaded for serving.

    DS-MoE and OLMoE models without such options are computed by their own modules, in which the
    inference rule may change from text to text. These report a damaged configuration, and do not
    read quantised weights.
    """
    if options.is_served:
        return True
    return not computed_whole(folder_of(model))


def shared_steps(requests: int | None) -> dict[str, Any]:
    """Return the settings of `moefit.load` for this many requests at once.

    >>> shared_steps(None)  # no server
    {}
    """
    if requests is None:
        return {}
    return {
        "sequences": requests,
        "prompt_logits": PROMPT_LOGITS_BYTES,
        "helpers": RENDER_RESIDENT,
        "step_tokens": EngineSettings(max_concurrency=requests).step_tokens,
    }


def draft_memory(speculate: Speculate, context: int) -> dict[str, Any]:
    """Return what drafting takes beside the model, as settings of `moefit.load`.

    Args:
        speculate: Where drafts come from.
        context: Tokens of all requests together.

    Raises:
        CheckpointError: There is no such draft model.

    >>> draft_memory(Speculate(), 2048)
    {}
    """
    if speculate.setting == "off":
        return {}
    if speculate.setting == "mtp":
        return {"draft_rows": MAX_STEP_DRAFTS, "mtp": True}
    if speculate.draft is not None:
        return {"draft_rows": MAX_STEP_DRAFTS, "draft": draft_folder_of(speculate.draft)}
    return {"draft_rows": MAX_STEP_DRAFTS, "helpers": LOOKUP_BYTES * context}


def import_serving_commands() -> None:
    """Import all commands that serve, so that this process takes as much memory as theirs.

    An estimate starts from what this process holds.
    """
    for name in ("chat", "evaluate", "serve"):
        import_module(f"moefit.cli.{name}")


def minimums(
    skeleton: Skeleton, settings: LoadSettings, packed: PackedStore, budget: MemoryBudget
) -> dict[str, int]:
    """Return the least budget of each command that serves, with these settings.

    Args:
        skeleton: Of the model.
        settings: Settings that all commands share.
        packed: Packed experts.
        budget: Estimate with these settings, whose process size is used for all commands.
    """
    requests = _CONCURRENCY if settings.sequences == 1 else settings.sequences
    server = shared_steps(requests)
    own: dict[str, dict[str, Any]] = {
        "generate": {},
        "bench": {},
        "chat": {"helpers": RENDER_RESIDENT, "step_tokens": CHAT_ENGINE.step_tokens},
        "eval": {"prompt_logits": WHOLE_WINDOWS},
        "serve": server,
    }
    alone = replace(
        settings, memory=None, sequences=1, prompt_logits=0, helpers=0, step_tokens=None
    )
    sizes: dict[str, int] = {}
    for command, more in own.items():
        one = memory_budget(skeleton, replace(alone, **more), packed, probe_bytes=0)
        measured = budget.process - settings.helpers + one.slack - budget.slack
        sizes[command] = replace(one, process=measured + more.get("helpers", 0)).min_bytes
    return sizes


def minimums_line(sizes: Mapping[str, int], settings: LoadSettings) -> str:
    """Return the minimum budgets in one line, in bytes for --memory."""
    requests = _CONCURRENCY if settings.sequences == 1 else settings.sequences
    words = {"serve": f"serve --max-concurrency {requests}"}
    parts = ", ".join(f"{words.get(name, name)} {size}" for name, size in sizes.items())
    return f"least --memory with --context {settings.context}: {parts}"


@contextmanager
def loading() -> Iterator[Progress]:
    """Show a progress bar while a model is loaded."""
    columns = (
        SpinnerColumn(),
        TextColumn("loading{task.fields[what]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[done]}"),
        TimeRemainingColumn(),
    )
    if logs_json():
        yield lambda what, done, total: None
        return
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, what="", done="")

        def show(what: str, done: int, total: int) -> None:
            count = f"{done:,} of {total:,}"
            bar.update(task, completed=done, total=total, what=f" {what}", done=count)

        yield show


def _summary(served: ServedModel, options: ServingOptions) -> str:
    report = served.report()
    slots, experts = sum(report["slots"].values()), sum(report["experts"].values())
    total = served.budget.total
    budget = "no budget" if total is None else f"a budget of {format_bytes(total)}"
    formats = _formats(report, options.experts)
    dense = dense_line(options.dense, report["dense_from"])
    adapter = f", with the adapter {report['adapter']}" if report["adapter"] else ""
    threads = processors().describe(torch.get_num_threads())
    kernels = f", kernels: {backend_status(served.model.device)}, {threads}"
    return (
        f"{type(served.model).__name__} in {budget}: {slots:,} slots for {experts:,} experts, "
        f"mode {report['mode']}{formats}{dense}{adapter}{kernels}"
    )


def dense_line(dense: str, source: str) -> str:
    """Return in which format dense weights are, unless it is the model's own dtype.

    >>> dense_line("int4", "packed"), dense_line("native", "checkpoint")
    (', dense weights in int4, packed', '')
    """
    return "" if dense == NATIVE_PRECISION else f", dense weights in {dense}, {source}"


def _formats(report: dict[str, Any], precision: str) -> str:
    """Return what experts are held in, unless it is the model's own dtype."""
    if precision != NATIVE_PRECISION:
        return f", experts in {_precision(report)}, {report['experts_from']}"
    held = " and ".join(report["checkpoint"]["held"])
    packed = f", {report['experts_from']}" if "packed" in report["experts_from"] else ""
    return f", experts in {held}, as the checkpoint has them{packed}" if held else ""


def _precision(report: dict[str, Any]) -> str:
    """Return the formats of slots, with their numbers if they differ."""
    total: Counter[str] = Counter()
    for counts in report["formats"].values():
        total.update(counts)
    return next(iter(total)) if len(total) == 1 else _counted(total)


def _counted(formats: Mapping[str, int]) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in sorted(formats.items()))


def _in(precision: str) -> str:
    return "" if precision == NATIVE_PRECISION else f" in {precision}"


def estimate_table(budget: MemoryBudget, start: InitialFormats, title: str) -> Table:
    """Return a memory estimate as a table: parts, slots and totals."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name in PARTS:
        size, meaning = getattr(budget, name), part_label(name, budget.kv_dtype)
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
        "minimum": budget.min_bytes,
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
    """Return measured speeds as a table."""
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
        "prefetched, of these chosen": f"{speed.prefetches:,}, {speed.prefetches_used:,}",
        "read from storage a token": format_bytes(speed.bytes_read_per_token),
        "storage, memory bandwidth": f"{format_bytes(bandwidth.storage)}/s, "
        f"{format_bytes(bandwidth.memory)}/s",
        "peak of the process": format_bytes(speed.peak_process_bytes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
