"""The commands of the planner: profile, plan."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moefit.api import folder_of
from moefit.checkpoint.model_folder import read_tokenizer
from moefit.cli.app import ADVANCED, Device, Dtype, Json, Model, command, console, print_json, say
from moefit.cli.loading import import_serving_commands, shared_steps
from moefit.cli.options import warn_renamed
from moefit.cli.plan_tables import check_picture, draw, plan_dict, print_plan
from moefit.cli.planned import target_of
from moefit.errors import ConfigError
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.plan.experiments import DENSE_FORMATS
from moefit.plan.measure import MeasuredModel
from moefit.plan.plan_file import Plan, Target, write_plan
from moefit.plan.planner import Planner
from moefit.plan.profile import find_profile
from moefit.plan.profiler import Profiler, Progress
from moefit.plan.reference import windows_of
from moefit.plan.search import PlanConstraints, Point
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.budget import parse_bytes


@command("profile")
def profile_model(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to measure on; the held-out standard library if not given"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="how many tokens of the text to use")] = 2048,
    context: Annotated[int, typer.Option(min=32, help="window length in tokens")] = 256,
    rule: Annotated[
        str | None, typer.Option(help="inference rule of a DS-MoE; the model's own if not given")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="memory for measuring; three quarters of what is free if not given"),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="the checkpoint's own if not given", rich_help_panel=ADVANCED),
    ] = None,
    device: Device = "cpu",
    again: Annotated[
        bool, typer.Option("--again", help="repeat timings, for example if the machine was busy")
    ] = False,
    as_json: Json = False,
) -> None:
    """Resumes where it stopped: what was measured is not measured again."""
    folder = folder_of(model)
    windows_BT = windows_of(
        text_of_file(text, read_tokenizer(folder), context, tokens)
        if text is not None
        else held_out_text(read_tokenizer(folder), context, tokens)
    )
    subject = MeasuredModel(
        folder=folder, dtype=dtype.torch if dtype else None, rule=rule, device=device
    )
    profiler = Profiler(
        subject,
        windows_BT,
        text=text.name if text else "held-out standard library",
        memory=None if memory is None else parse_bytes(memory),
    )
    with _bar() as progress:
        profile = profiler.run(progress, again=again)
    if as_json:
        print_json({"path": str(profiler.path), "items": dict(profile.items)})
        return
    say(f"{len(profile.items)} measurements: {profiler.path}")
    say(f"next: moefit plan {shlex.quote(model)} --memory SIZE")


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("profiling")

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield show


RestName = StrEnum("RestName", list(DENSE_FORMATS))


@command("plan")
def plan_model(
    model: Model,
    memory: Annotated[
        str | None,
        typer.Option(
            help="memory budget, such as 4.7GiB: every byte of the process on the device. If not "
            "given, the smallest that satisfies --max-loss and --min-speed"
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="most increase of perplexity, such as 3%; the fastest within it is chosen"
        ),
    ] = None,
    min_speed: Annotated[
        float | None, typer.Option(help="least tokens/s; the most accurate above it is chosen")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens that the KV cache holds")] = 2048,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="plan for a server that runs this many requests at once",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    dense_precision: Annotated[
        RestName | None,
        typer.Option(
            help="format of all weights but experts; the planner chooses if not given",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    rest: Annotated[
        RestName | None, typer.Option("--rest", hidden=True, callback=warn_renamed)
    ] = None,
    process_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            hidden=True,
            help="memory of the process that will serve; this process's if not given",
        ),
    ] = None,
    budgets: Annotated[
        int,
        typer.Option(min=0, help="number of other budgets to show", rich_help_panel=ADVANCED),
    ] = 8,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="profile to use; the model's newest if not given", rich_help_panel=ADVANCED
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="write the plan to this file, for --plan")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="write a chart to this .png or .svg file")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="the checkpoint's own if not given", rich_help_panel=ADVANCED),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """The choice for a budget, and what other budgets would give."""
    target = target_of(max_loss, min_speed)
    _refuse_vain(memory, target, save)
    if picture is not None:
        check_picture(picture, budgets)
    if process_bytes is None:
        import_serving_commands()
    skeleton = build_skeleton(folder_of(model), dtype.torch if dtype else None)
    known = find_profile(skeleton, model=model, path=profile)
    dense = dense_precision or rest
    constraints = PlanConstraints(
        process=process_bytes,
        dense_formats=DENSE_FORMATS if dense is None else (dense.value,),
        **shared_steps(max_concurrency),
    )
    planner = Planner(skeleton, known, context=context, device=device, constraints=constraints)
    plan, front = _planned(planner, memory, target)
    fronts = dict(planner.fronts_by_budget(budgets)) if budgets else {}
    if save is not None and plan is not None:
        write_plan(plan, save)
    if picture is not None:
        draw(fronts, picture, model)
    if as_json:
        print_json(plan_dict(planner, plan, front, fronts))
        return
    print_plan(planner, plan, fronts, model, smallest=memory is None)
    _say_written(model, save, picture)


def _refuse_vain(memory: str | None, target: Target, save: Path | None) -> None:
    if memory is None and save is not None and not target.is_set:
        raise ConfigError(
            "--save writes the plan for a budget; give --memory, such as 4.7GiB, or --max-loss 3% "
            "for the smallest budget that keeps it"
        )


def _planned(
    planner: Planner, memory: str | None, target: Target
) -> tuple[Plan | None, list[Point]]:
    """The plan for the budget, else for the smallest that keeps the promise; and its front."""
    if memory is not None:
        return planner.plan(parse_bytes(memory), target)
    if not target.is_set:
        return None, []
    # Where nothing keeps the promise, planning for everything says what is nearest.
    return planner.plan(
        planner.smallest_budget(target) or planner.slot_budgets.all_resident_bytes, target
    )


def _say_written(model: str, save: Path | None, picture: Path | None) -> None:
    for path in filter(None, (save, picture)):
        say(f"wrote {path}")
    if save is not None:
        words = shlex.quote(model), shlex.quote(str(save))
        say("next: moefit serve {} --plan {}".format(*words))
