"""The command `simulate`: absent experts fetched to a GPU or computed where they lie."""

from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moefit.cli.app import Json, advanced, command, option, print_json, say
from moefit.cli.plan_tables import check_picture, save_figure
from moefit.errors import ConfigError
from moefit.evaluate.report import narrow_table
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.hybrid.rules import RULES
from moefit.simulate.costs import ExpertShape, expert_costs, find_hardware, find_shape, known
from moefit.simulate.routing import Ids, Workload, random_routing, read_recording, steps_of
from moefit.simulate.timeline import Cache, Outcome, Simulation

_FETCH_ALL = "fetch-all"


@command("simulate")
def simulate(
    recording: Annotated[
        Path | None, typer.Argument(help="Recorded routing, .npz. Default: random routing.")
    ] = None,
    shape: Annotated[
        str, option(f"Sizes of experts: {', '.join(known('shapes'))}, or a .yaml file.")
    ] = "gpt-oss-20b",
    hardware: Annotated[
        str, option(f"What computes: {', '.join(known('hardware'))}, or a .yaml file.")
    ] = "rtx-4090-ddr5",
    batch: Annotated[int, option("Sequences that decode together.", min=1)] = 1,
    prompt: Annotated[int, option("Compute prompts of so many tokens instead.", min=0)] = 0,
    slots: Annotated[int, option("Experts of a layer that the GPU holds.", min=0)] = 0,
    recall: Annotated[
        float, option("Share of the coming layer's experts that are prefetched.", min=0, max=1)
    ] = 0.0,
    picture: Annotated[Path | None, option("Draw the times, .png or .svg.")] = None,
    steps: Annotated[int, advanced("Most steps.", min=1)] = 64,
    skew: Annotated[float, advanced("Of random routing: 0 for equal shares.", min=0)] = 1.0,
    eviction: Annotated[str, advanced(f"One of {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    seed: Annotated[int, advanced("Of random routing and guesses.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Simulate which experts to fetch to a GPU and which to compute where they lie."""
    sizes, device = find_shape(shape), find_hardware(hardware)
    if picture is not None:
        check_picture(picture, 1)
    if eviction not in POLICIES:
        raise ConfigError(
            f"{eviction!r} is not an eviction policy; give one of {', '.join(POLICIES)}"
        )
    if slots > sizes.experts:
        raise ConfigError(f"{slots} slots, but a layer of {sizes.name} has {sizes.experts} experts")
    if not isfinite(skew):
        raise ConfigError(f"--skew {skew} is no finite number; give 0 for equal shares, or about 1")
    workload = Workload(batch=batch, prompt=prompt, steps=steps)
    workload.check()
    sequences = (
        _random(sizes, workload, skew, seed)
        if recording is None
        else read_recording(recording, sizes)
    )
    cache = Cache(slots=slots, eviction=eviction, recall=recall, seed=seed)
    costs = expert_costs(device, sizes)
    outcomes = {
        name: Simulation(costs, sizes, rule, cache).run(steps_of(sequences, workload))
        for name, rule in RULES.items()
    }
    if picture is not None:
        _draw(outcomes, f"{sizes.name} on {device.name}", picture)
    if as_json:
        rules = {name: _numbers(name, outcomes) for name in outcomes}
        found = {"shape": sizes.model_dump(), "hardware": device.model_dump(), "rules": rules}
        print_json(found)
        return
    _print(Console(), outcomes, f"{sizes.name} on {device.name}, per layer")
    say("a layer takes the longer one of GPU (copies and computation) and far side")
    say(f"rates: {device.source}")
    if picture is not None:
        say(f"picture: {picture}")


def _random(shape: ExpertShape, workload: Workload, skew: float, seed: int) -> list[Ids]:
    """Return random sequences, as many as are computed."""
    length = workload.prompt or workload.steps
    number = workload.steps if workload.prompt else workload.batch
    ids_TLK = random_routing(shape, skew, number * length, seed)
    return [ids_TLK[at * length : (at + 1) * length] for at in range(number)]


def _numbers(name: str, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return what a rule's outcome is reported as."""
    one, slowest = outcomes[name], outcomes[_FETCH_ALL]
    return {
        "milliseconds_per_layer": 1e3 * one.seconds / one.layers,
        "gpu_milliseconds_per_layer": 1e3 * one.gpu / one.layers,
        "far_milliseconds_per_layer": 1e3 * one.far / one.layers,
        "tokens_per_second": one.tokens / one.seconds,
        "times_fetch_all": slowest.seconds / one.seconds,
        "bytes_per_token": (one.weight_bytes + one.token_bytes) / one.tokens,
        "resident": one.resident / one.wanted,
        "prefetched": one.prefetched / one.wanted,
        "fetched": one.fetched / one.wanted,
        "wasted_loads": one.wasted / one.wanted,
    }


def _print(out: Console, outcomes: dict[str, Outcome], title: str) -> None:
    table: Table = narrow_table(title)
    columns = ("ms", "GPU ms", "far ms", "tok/s", "speed-up", "MB/token", "on GPU", "fetched")
    table.add_column("rule", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name in outcomes:
        found = _numbers(name, outcomes)
        table.add_row(
            name,
            f"{found['milliseconds_per_layer']:.3g}",
            f"{found['gpu_milliseconds_per_layer']:.3g}",
            f"{found['far_milliseconds_per_layer']:.3g}",
            _short(found["tokens_per_second"]),
            f"{found['times_fetch_all']:.2f}",
            _short(found["bytes_per_token"] / 1e6),
            f"{found['resident'] + found['prefetched']:.0%}",
            f"{found['fetched']:.0%}",
        )
    out.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _draw(outcomes: dict[str, Outcome], title: str, path: Path) -> None:
    """Plot both sides' times per layer, and the layer's, by rule."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(outcomes))
    for shift, name in ((-0.2, "gpu"), (0.2, "far")):
        heights = [1e3 * getattr(one, name) / one.layers for one in outcomes.values()]
        label = "GPU: copies and computation" if name == "gpu" else "far side"
        axes.bar([at + shift for at in places], heights, 0.38, label=label)
    whole = [1e3 * one.seconds / one.layers for one in outcomes.values()]
    axes.plot(places, whole, "k_", ms=28, label="layer")
    axes.set_xticks(list(places), list(outcomes))
    axes.set(ylabel="ms per layer", title=title, ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
