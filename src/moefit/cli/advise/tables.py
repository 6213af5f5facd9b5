"""Output of `moefit advise` and `moefit law`: tables and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moefit.advise.fitting import Fit, HeldOut
from moefit.advise.laws import Law
from moefit.advise.recommend import Advice, Opinion, OverTraining
from moefit.advise.search import Candidate, pareto_front
from moefit.advise.serving import CONTEXT, QUANTISATION_NATS
from moefit.advise.shapes import short_count
from moefit.cli.app import say
from moefit.cli.plan_tables import save_figure
from moefit.errors import ConfigError
from moefit.evaluate.report import narrow_table
from moefit.serve.memory.budget import format_bytes

_ROWS = 8  # of the front's table


def print_advice(out: Console, advice: Advice) -> None:
    """Print the recommendation, its alternatives, and how sure it is."""
    out.print(_recommended(advice))
    out.print(_alternatives(advice))
    out.print(_front_table(advice))
    if advice.over_training is not None:
        for line in _over_training(advice, advice.over_training):
            out.print(line, markup=False, highlight=False)
    out.print(_opinions(advice))
    for warning in advice.warnings:
        say(f"warning: {warning}")
    chosen, limits = advice.chosen, advice.question.limits
    memory = "" if limits.memory is None else f" --memory {int(limits.memory)}"
    precision = f" --precision {chosen.precision}" * (chosen.precision != "native")
    dense = f" --dense-precision {chosen.sizes.dense_precision}" * (chosen.precision != "native")
    context = "" if limits.context == CONTEXT else f" --context {limits.context}"
    say(f"once trained: moefit serve RUN --dtype bfloat16{memory}{precision}{dense}{context}")


def _recommended(advice: Advice) -> Table:
    chosen, question = advice.chosen, advice.question
    shape = chosen.shape
    table = narrow_table(f"train: {shape.describe()}")
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("why")
    table.add_row("active parameters", short_count(shape.active), _speed_words(advice))
    table.add_row("total parameters", short_count(shape.total), _memory_words(advice))
    ratio = f"{_digits(chosen.tokens / shape.active)} per active parameter"
    table.add_row("training tokens", short_count(chosen.tokens), ratio)
    cost = QUANTISATION_NATS[chosen.precision]
    added = f", of which {cost:g} for {chosen.precision}" if cost else ""
    table.add_row("loss", f"{chosen.loss:.3f} nats", f"by {question.law.name}'s law{added}")
    table.add_row("learning rate", f"{shape.learning_rate:.3g}", "peak, Ludziejewski et al. 2025")
    table.add_row("no larger because of", "", advice.limited_by)
    if (traffic := chosen.traffic) is not None and question.traffic is not None:
        words = (
            f"{traffic.sequences:.0f} sequences at once on {traffic.devices} device(s); "
            f"{_digits(question.traffic.tokens_per_second)} tokens/s wanted"
        )
        table.add_row("serves", f"{_digits(traffic.capacity)} tok/s", words)
        price = f"{_digits(1e6 * traffic.device_seconds)} s"
        table.add_row("per million tokens", price, "of one device")
    table.add_row("speeds are from", "", question.device.basis)
    return table


def _speed_words(advice: Advice) -> str:
    """Return the bytes that a token reads, and the speed of one sequence."""
    cost, wanted = advice.chosen.memory, advice.question.limits.min_speed
    fetched = f" and {format_bytes(cost.fetched)} from storage" if cost.fetched else ""
    read = f"a token reads {format_bytes(cost.read)}{fetched}"
    speed = f"{read}: {_digits(advice.chosen.speed)} tokens/s"
    return speed if wanted is None else f"{speed}, {wanted:g} wanted"


def _memory_words(advice: Advice) -> str:
    """Return the bytes that the model takes when it is served, and those that there are."""
    chosen, question = advice.chosen, advice.question
    precision = "bf16" if chosen.precision == "native" else chosen.precision
    memory = format_bytes(question.limits.memory or question.device.memory)
    devices = 1 if chosen.traffic is None else chosen.traffic.devices
    count = "" if devices == 1 else f"{devices} x "
    held = format_bytes(chosen.memory.resident)
    return f"{held} served in {precision}, of {count}{memory}"


def _digits(value: float) -> str:
    """Return a number with three digits, or all before the point.

    >>> _digits(10.26), _digits(5821.4)
    ('10.3', '5,821')
    """
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _alternatives(advice: Advice) -> Table:
    table = narrow_table("the best for each number of experts, within the same limits")
    _candidate_columns(table)
    for one in advice.by_experts:
        _add_candidate(table, one, advice.chosen)
    return table


def _front_table(advice: Advice) -> Table:
    table = narrow_table("loss against serving cost at this training budget (Pareto front)")
    _candidate_columns(table)
    for one in _thinned(advice.front, advice.chosen):
        _add_candidate(table, one, advice.chosen)
    return table


def _candidate_columns(table: Table) -> None:
    for name in ("experts", "active", "total", "tokens", "as", "memory", "tok/s", "loss", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)


def _add_candidate(table: Table, one: Candidate, chosen: Candidate) -> None:
    speed = one.speed if one.traffic is None else one.traffic.capacity
    shape = one.shape
    grains = f"{shape.num_experts}, top-{shape.top_k}" if shape.granularity > 1 else shape.experts
    table.add_row(
        str(grains),
        short_count(shape.active),
        short_count(shape.total),
        short_count(one.tokens),
        "bf16" if one.precision == "native" else one.precision,
        format_bytes(one.memory.resident),
        _digits(speed),
        f"{one.loss:.3f}",
        "<-" if one == chosen else "",
    )


def _thinned(front: Sequence[Candidate], chosen: Candidate) -> Iterator[Candidate]:
    """Yield some points of a front in equal steps of loss, and the chosen one."""
    span = front[0].loss - front[-1].loss
    last = float("inf")
    for one in front:
        if one in (front[0], front[-1], chosen) or last - one.loss >= span / _ROWS:
            last = one.loss
            yield one


def _over_training(advice: Advice, over: OverTraining) -> list[str]:
    chosen = advice.chosen
    if over.optimal == chosen.shape:
        return ["it is the loss-optimal size for its number of experts: nothing is over-trained"]
    share = chosen.memory.resident / over.resident
    optimal = f"{short_count(over.optimal.active)} active parameters"
    return [
        f"over-training: the loss-optimal model with {over.optimal.num_experts} experts has "
        f"{optimal} on {short_count(over.optimal_tokens)} tokens; against it, this one loses "
        f"{over.loss:.4f} nats, takes {share:.0%} of its memory and decodes "
        f"{chosen.speed / over.speed:.2g} times as fast",
        f"the same loss would take a loss-optimal model {over.compute_share:.0%} of the budget",
    ]


def _opinions(advice: Advice) -> Table:
    title = (
        "what other laws choose within the same limits, and the nats that this recommendation "
        "loses by each"
    )
    table = narrow_table(title)
    for name in ("law", "experts", "active", "tokens", "loses", "note"):
        table.add_column(name, justify="left" if name in ("law", "note") else "right")
    chosen = advice.chosen
    law = advice.question.law
    row = Opinion(law=law.name, choice=chosen.shape, tokens=chosen.tokens, regret=0.0, reason="")
    for one in (row, *advice.opinions):
        shape = one.choice
        table.add_row(
            one.law,
            "" if shape is None else str(shape.num_experts),
            "" if shape is None else short_count(shape.active),
            "" if shape is None else short_count(one.tokens),
            "" if one.regret is None else f"{one.regret:.3f}",
            f"this recommendation: {law.error}" if one is row else one.reason,
        )
    if advice.leverage != 1.0:
        note = f"a dense model of its loss needs {advice.leverage:.2g} times its FLOPs"
        table.add_row("leverage", "", "", "", "", note)
    return table


def draw_front(advice: Advice, path: Path) -> None:
    """Plot loss over serving cost and over memory: a Pareto front per number of experts.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    costs, sizes = figure.subplots(1, 2, sharey=True)
    has_traffic = advice.question.traffic is not None

    def cost(one: Candidate) -> float:
        return one.cost * 1e6 if has_traffic else one.speed

    def memory(one: Candidate) -> float:
        return one.memory.resident / 2**30

    for experts in (one.shape.experts for one in advice.by_experts):
        some = [one for one in advice.everything if one.shape.experts == experts]
        for axes, value, front in (
            (costs, cost, pareto_front(some)),
            (sizes, memory, pareto_front(some, memory)),
        ):
            losses = [one.loss for one in front]
            axes.plot(list(map(value, front)), losses, ".-", lw=1, ms=4, label=f"E = {experts}")
    chosen = advice.chosen
    for axes, value in ((costs, cost), (sizes, memory)):
        axes.plot([value(chosen)], [chosen.loss], "k*", ms=13, label="recommended")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    name = "device-seconds per million tokens" if has_traffic else "tokens/s of one sequence"
    costs.set(xlabel=name, ylabel="predicted loss, nats")
    sizes.set(xlabel="memory when served, GiB")
    costs.legend(fontsize=8)
    figure.suptitle(f"{advice.question.flops:.3g} FLOPs, {advice.question.law.name}'s law")
    save_figure(figure, path)


def laws_table(laws: Sequence[Law]) -> Table:
    """Return a table of laws."""
    table = narrow_table("scaling laws")
    for name in ("law", "form", "N counts", "runs", "error", "arXiv"):
        table.add_column(name, no_wrap=name in ("law", "arXiv"))
    for one in laws:
        ranges = [
            f"{symbol} {short_count(least)} to {short_count(most)}"
            for symbol, (least, most) in (
                ("N", one.ranges.get("parameters", (1, 1))),
                ("D", one.ranges.get("tokens", (1, 1))),
                ("E", one.ranges.get("experts", (1, 1))),
            )
            if least < most
        ]
        source = one.source.partition("arXiv ")[2][:10]
        table.add_row(one.name, one.form, one.counts.value, "; ".join(ranges), one.error, source)
    return table


def fit_table(fit: Fit) -> Table:
    """Return a table of coefficients with their intervals."""
    table = narrow_table(f"{fit.form.formula}; N: {fit.runs.counts.value}")
    for name in ("coefficient", "value", "95% interval"):
        table.add_column(name, justify="left" if name == "coefficient" else "right")
    for name, value in fit.coefficients.items():
        ends = fit.intervals.get(name)
        interval = "" if ends is None else f"{ends[0]:.5g} to {ends[1]:.5g}"
        table.add_row(name, f"{value:.5g}", interval)
    return table


def held_out_line(what: str, errors: HeldOut) -> str:
    """Return a line on the errors of runs that a fit did not see."""
    worst = max(range(len(errors.names)), key=lambda index: abs(errors.relative[index]))
    return (
        f"{what}: {errors.rms_log10:.4f} of log10 L (rms), at worst {errors.relative[worst]:+.2%} "
        f"({errors.names[worst]})"
    )


def draw_fit(fit: Fit, path: Path) -> None:
    """Plot predicted over measured losses, and the error over compute.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    runs, points = fit.runs.used, fit.runs.points
    measured = [one.loss for one in runs]
    predicted = fit.form.loss(fit.coefficients, points)
    error = 100 * (predicted / measured - 1)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for experts in sorted({one.experts for one in runs}):
        some = [index for index, one in enumerate(runs) if one.experts == experts]
        label = f"E = {experts:g}"
        losses.plot([measured[i] for i in some], predicted[some], "o", ms=4, label=label)
        compute = [6 * runs[i].parameters * runs[i].tokens for i in some]
        errors.plot(compute, error[some], "o", ms=4)
    if fit.extrapolated is not None:
        held = dict(zip(fit.extrapolated.names, fit.extrapolated.relative, strict=True))
        some = [one for one in runs if one.name in held]
        compute = [6 * one.parameters * one.tokens for one in some]
        errors.plot(compute, [100 * held[one.name] for one in some], "kx", label="held out")
        errors.legend(fontsize=8)
    ends = [min(measured), max(measured)]
    losses.plot(ends, ends, "-", lw=1, color="grey")
    losses.set(xlabel="measured loss, nats", ylabel="predicted loss, nats")
    errors.set(xlabel="6 N D, FLOPs", ylabel="predicted over measured, %", xscale="log")
    losses.legend(fontsize=8)
    for axes in (losses, errors):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{fit.form.name}, {len(runs)} runs")
    save_figure(figure, path)


def check_new_file(path: Path) -> None:
    """Raise ConfigError if a file cannot be written, before the work whose result it holds."""
    if path.exists():
        raise ConfigError(f"{path} exists; give another name, or remove it first")
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"there is no folder {path.absolute().parent} to write {path.name} into; create it, or "
            "name a file in a folder that exists"
        )
