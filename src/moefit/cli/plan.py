"""Commands of the planner: profile, plan."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from moefit.api import folder_of
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.cli.app import (
    Json,
    advanced,
    command,
    option,
    print_json,
    progress_bar,
    say,
)
from moefit.cli.loading import import_serving_commands, shared_steps
from moefit.cli.options import (
    MAX_LOSS,
    MIN_SPEED,
    Context,
    DensePrecision,
    Device,
    DtypeOption,
    ForConcurrency,
    InferenceRule,
    KvCache,
    KvCacheOption,
    Model,
    PrefetchName,
    Rest,
    TextFile,
    torch_dtype,
)
from moefit.cli.pack import fit_model_probes
from moefit.cli.plan_tables import check_picture, draw, plan_dict, print_plan
from moefit.cli.planned import target_of
from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.plan.configuration import Lengths
from moefit.plan.experiments import DENSE_FORMATS
from moefit.plan.measure import MeasuredModel
from moefit.plan.plan_file import Plan, Target, write_plan
from moefit.plan.planner import Planner
from moefit.plan.profile import Profile, find_profile
from moefit.plan.profiler import Profiler
from moefit.plan.reference import read_windows
from moefit.plan.search import PlanConstraints, Point
from moefit.serve.config import LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.load import load_model
from moefit.serve.memory.budget import parse_bytes
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.prediction.fit_probes import refuse_unpredictable
from moefit.serve.windows import Windows
from moefit.simulate.recording import check_recording, record_routing


@command("profile")
def profile_model(
    model: Model,
    text: TextFile = None,
    tokens: Annotated[int, option("Number of tokens of the text to use.", min=2)] = 2048,
    context: Annotated[int, option("Window length in tokens.", min=32)] = 256,
    rule: InferenceRule = None,
    memory: Annotated[
        str | None, option("Memory for measuring. Default: three quarters of what is free.")
    ] = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    again: Annotated[
        bool, option("Repeat timings, for example if the machine was busy.", "--again")
    ] = False,
    probes: Annotated[
        bool,
        option("Also fit probes on the text, which predict experts for --prefetch.", "--probes"),
    ] = False,
    routing: Annotated[
        Path | None, option("Also write the text's routing for `moefit simulate`, .npz.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Skip what was measured before, so that an interrupted run resumes."""
    folder = folder_of(model)
    skeleton = build_skeleton(folder, torch_dtype(dtype))
    if probes:
        refuse_unpredictable(skeleton)
    if routing is not None:
        check_recording(routing, skeleton)
    windows = read_windows(skeleton.model, text, read_tokenizer(folder), context, tokens)
    subject = MeasuredModel(folder=folder, dtype=torch_dtype(dtype), rule=rule, device=device)
    name = text.name if text else "held-out standard library"
    budget = None if memory is None else parse_bytes(memory)
    profiler = Profiler(subject, windows, text=name, memory=budget)
    if routing is not None:  # first, since a profile takes minutes
        _write_routing(subject, windows, routing, text=name, memory=budget)
    with progress_bar("profiling") as progress:
        profile = profiler.run(progress, again=again)
    fitted: dict[str, Any] = {}
    if probes:
        on = CalibrationText(text=name, digest=windows.digest, windows=windows, memory=budget)
        fitted = {"probes": fit_model_probes(skeleton, on, quiet=as_json).as_dict()}
    if as_json:
        print_json({"path": str(profiler.path), "items": dict(profile.items)} | fitted)
        return
    say(f"{len(profile.items)} measurements: {profiler.path}")
    say(f"next: moefit plan {shlex.quote(model)} --memory SIZE")


def _write_routing(
    subject: MeasuredModel, windows: Windows, path: Path, *, text: str, memory: int | None
) -> None:
    """Write what a model's routers choose on a text."""
    settings = LoadSettings(
        memory=memory,
        device=subject.device,
        context=windows.context + 1,
        dtype=subject.dtype,
        generation_config=IGNORE,
    )
    with load_model(subject.folder, settings) as served:
        if subject.rule is not None:
            use_rule(served.model, Rule.parse(subject.rule))
        found = record_routing(served, windows, f"{subject.folder.name} on {text}")
    sizes = found.write(path)
    files = f"{shlex.quote(str(path))} --shape {shlex.quote(str(sizes))}"
    say(f"routing: moefit simulate {files}")


@command("plan")
def plan_model(
    model: Model,
    memory: Annotated[
        str | None,
        option(
            "Memory budget, such as 4.7GiB: every byte of the process on the device. Default: the "
            "smallest that satisfies --max-loss and --min-speed."
        ),
    ] = None,
    max_loss: Annotated[str | None, option(MAX_LOSS)] = None,
    min_speed: Annotated[float | None, option(MIN_SPEED)] = None,
    context: Context = 2048,
    kv_cache: KvCacheOption = KvCache.model,
    max_concurrency: ForConcurrency = None,
    step_tokens: Annotated[
        int | None,
        advanced(
            "Reserve activations for forward passes of this many tokens, such as a server's "
            "--prefill-chunk and requests together. Default: what a server computes with "
            "--max-concurrency; without it, prompts as long as the context.",
            min=1,
        ),
    ] = None,
    prefetch: Annotated[
        PrefetchName,
        advanced(
            "That the model is to be served with. Other than off: leave room for its probes, if "
            "there are any."
        ),
    ] = PrefetchName.off,
    prefetch_horizon: Annotated[
        int, advanced("With --prefetch: layers ahead that it is served with.", min=1, max=4)
    ] = 1,
    dense_precision: DensePrecision = None,
    rest: Rest = None,
    source_tokens: Annotated[
        float | None,
        advanced("For encoder-decoders: tokens of a source. Default: the profile's mean.", min=1),
    ] = None,
    target_tokens: Annotated[
        float | None,
        advanced("For encoder-decoders: tokens of an output. Default: the profile's mean.", min=1),
    ] = None,
    process_bytes: Annotated[
        int | None, option("Memory of the process that will serve.", min=0, hidden=True)
    ] = None,
    budgets: Annotated[int, advanced("Number of other budgets to show.", min=0)] = 8,
    profile: Annotated[Path | None, advanced("Profile. Default: the model's newest.")] = None,
    save: Annotated[Path | None, option("Write the plan to this file, for --plan.")] = None,
    picture: Annotated[Path | None, option("Write a chart to this .png or .svg file.")] = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print the plan for a budget, and what other budgets would give."""
    target = target_of(max_loss, min_speed)
    _refuse_vain(memory, target, save)
    if picture is not None:
        check_picture(picture, budgets)
    if process_bytes is None:
        import_serving_commands()
    shared = shared_steps(max_concurrency)
    if step_tokens is not None:
        shared["step_tokens"] = step_tokens
    skeleton = build_skeleton(folder_of(model), torch_dtype(dtype))
    known = find_profile(skeleton, model=model, path=profile)
    planner = Planner(
        skeleton,
        known,
        context=context,
        device=device,
        constraints=PlanConstraints(
            process=process_bytes,
            dense_formats=_dense_formats(dense_precision or rest),
            kv_cache=kv_cache.value,
            **shared,
            prefetch=prefetch.value,
            prefetch_horizon=prefetch_horizon,
        ),
        lengths=_lengths(known, source_tokens, target_tokens),
    )
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


def _lengths(profile: Profile, source: float | None, target: float | None) -> Lengths | None:
    """Return the lengths of requests, if any are given."""
    if source is None and target is None:
        return None
    known = profile.facts.lengths or Lengths(source=1, target=1)
    return Lengths(source=source or known.source, target=target or known.target)


def _dense_formats(name: str | None) -> tuple[str, ...]:
    """Return the formats of dense weights to choose from."""
    if name is not None and name not in DENSE_FORMATS:
        raise ConfigError(
            f"plans hold dense weights in {', '.join(DENSE_FORMATS)}, not in {name!r}; give one "
            "of them as --dense-precision"
        )
    return DENSE_FORMATS if name is None else (name,)


def _refuse_vain(memory: str | None, target: Target, save: Path | None) -> None:
    if memory is None and save is not None and not target.is_set:
        raise ConfigError(
            "--save writes the plan for a budget; give --memory, such as 4.7GiB, or --max-loss 3% "
            "for the smallest budget that meets it"
        )


def _planned(
    planner: Planner, memory: str | None, target: Target
) -> tuple[Plan | None, list[Point]]:
    """Return the plan for the budget, or for the smallest that meets the target, and its front."""
    if memory is not None:
        return planner.plan(parse_bytes(memory), target)
    if not target.is_set:
        return None, []
    # If no budget meets the target, planning without a limit raises an error with the nearest.
    return planner.plan(
        planner.smallest_budget(target) or planner.slot_budgets.all_resident_bytes, target
    )


def _say_written(model: str, save: Path | None, picture: Path | None) -> None:
    for path in filter(None, (save, picture)):
        say(f"wrote {path}")
    if save is not None:
        words = shlex.quote(model), shlex.quote(str(save))
        say("next: moefit serve {} --plan {}".format(*words))
