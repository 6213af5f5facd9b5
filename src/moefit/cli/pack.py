"""The commands `pack` and `cache`: write and verify packed stores, and show and remove them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from moefit.api import folder_of
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.cli.app import COMMANDS, Json, advanced, app, command, console, option, print_json, say
from moefit.cli.options import DtypeOption, Model, torch_dtype
from moefit.errors import CheckpointError, ConfigError, MoefitError
from moefit.evaluate.loading import locate
from moefit.folders import cache_root
from moefit.plan.reference import read_windows
from moefit.quant.format import FORMATS, NATIVE, Format, parse_format
from moefit.serve.hf.skeleton import Skeleton, build_skeleton, held_formats
from moefit.serve.memory.budget import format_bytes, parse_bytes
from moefit.serve.packed.build import PackResult, Progress, pack
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.packed.check import check_packed
from moefit.serve.packed.kept import KINDS, Entry, entries, find, remove, remove_leftovers, unneeded
from moefit.serve.prediction.fit_probes import ProbeResult, fit_probes, refuse_unpredictable
from moefit.serve.prediction.probes import DEPTHS

_FORMATS = [NATIVE.name, *(name for name, format in FORMATS.items() if format.is_encoded)]
_DEFAULT = "int8,int4"

cache = typer.Typer(no_args_is_help=True, help=COMMANDS["cache"][1])
app.add_typer(cache, name="cache")
DryRun = Annotated[bool, option("Show what would be removed, and remove nothing.", "--dry-run")]
Yes = Annotated[bool, option("Remove without asking.", "--yes", "-y")]


@command("pack")
def pack_model(
    model: Model,
    formats: Annotated[
        str | None,
        option(
            f"Formats, separated by commas: {', '.join(_FORMATS)}. {NATIVE.name}: a quantised "
            f"checkpoint's own codes, the default for those that slots can hold. Other defaults: "
            f"{_DEFAULT}, with --check all that are packed, with --probes or --dense-formats none."
        ),
    ] = None,
    dense_formats: Annotated[
        str | None,
        option(
            "Formats of dense weights, for --dense-precision: attention, shared experts, "
            "embeddings, output head."
        ),
    ] = None,
    dtype: DtypeOption = None,
    text: Annotated[
        Path | None,
        option(
            "UTF-8 text to calibrate on (GPTQ); use one like that to be served. For "
            "encoder-decoders: a source and its target per line, separated by a tab."
        ),
    ] = None,
    tokens: Annotated[int, option("With --text: number of its tokens to use.", min=2)] = 16384,
    context: Annotated[int, advanced("With --text: window length in tokens.", min=32)] = 256,
    memory: Annotated[
        str | None, option("With --text: memory budget while calibrating. Default: no limit.")
    ] = None,
    probes: Annotated[
        bool,
        option(
            "With --text: fit probes on it, which predict experts for --prefetch (minutes).",
            "--probes",
        ),
    ] = False,
    check: Annotated[bool, option("Verify packed files.", "--check")] = False,
    force: Annotated[bool, option("Encode again what is packed already.", "--force")] = False,
    as_json: Json = False,
) -> None:
    """Skip files that are finished, so that an interrupted run resumes."""
    _refuse_combinations(check=check, force=force, text=text, memory=memory, probes=probes)
    skeleton = build_skeleton(folder_of(model), torch_dtype(dtype))
    dense = _formats(dense_formats)
    if formats is None and dense is None and not check and not probes:
        formats = _default(skeleton, calibrated=text is not None)
    chosen = _formats(formats)
    if check:
        _check(skeleton, chosen, dense, as_json=as_json)
        return
    if probes:
        refuse_unpredictable(skeleton)
    calibration = None if text is None else _calibration(skeleton, text, tokens, context, memory)
    made = None
    if chosen is not None or dense is not None:
        made = _pack(skeleton, chosen or (), dense or (), calibration, force=force)
    if made is not None and not as_json:
        _say_result(made)
    fitted = None
    if probes:
        assert calibration is not None
        fitted = fit_model_probes(skeleton, calibration, force=force, quiet=as_json)
    if as_json:
        found = {} if fitted is None else {"probes": fitted.as_dict()}
        print_json(({} if made is None else made.as_dict()) | found)


def _refuse_combinations(
    *, check: bool, force: bool, text: Path | None, memory: str | None, probes: bool
) -> None:
    if check and force:
        raise ConfigError("--check changes nothing and --force encodes again; give one of them")
    if check and text is not None:
        raise ConfigError("--check changes nothing and --text is for encoding; give one of them")
    if memory is not None and text is None:
        raise ConfigError(
            "--memory limits calibration on a text, and none is given; packing itself holds one "
            "expert at a time; leave it out, or give --text"
        )
    if probes and text is None:
        raise ConfigError(
            "--probes are fitted on a text, and none is given; give --text FILE with one like that "
            "to be served"
        )


def fit_model_probes(
    skeleton: Skeleton, text: CalibrationText, *, force: bool = False, quiet: bool = False
) -> ProbeResult:
    """Fit probes with progress bars, and say how well they predict.

    Args:
        skeleton: The model.
        text: To fit on.
        force: Fit again what was fitted on this text already.
        quiet: Say nothing at the end.
    """
    with _bars() as bars:
        fitted = fit_probes(
            skeleton,
            text,
            force=force,
            reading=bars("reading", lambda windows: f"{windows} windows"),
            fitting=bars("fitting probes", lambda blocks: f"{blocks} layers"),
        )
    if not quiet:
        say(_probes_line(fitted))
    return fitted


def _probes_line(fitted: ProbeResult) -> str:
    about, recalls = fitted.metadata, []
    for ahead in range(1, DEPTHS + 1):
        probes, routers = about.mean_recalls(ahead)
        if probes is not None:
            against = "" if routers is None else f" ({routers:.0%} by the later router)"
            recalls.append(f"{ahead} ahead {probes:.0%}{against}")
    better = f"; recall {', '.join(recalls)}" if recalls else ""
    did = "exist already" if fitted.skipped else f"written in {fitted.seconds:.1f} s"
    return (
        f"{len(about.recalls)} probes, {format_bytes(fitted.nbytes)}, fitted on "
        f"{about.tokens:,} tokens of {about.text}, {did}: {fitted.path}{better}"
    )


def _pack(
    skeleton: Skeleton,
    formats: Sequence[Format],
    dense_formats: Sequence[Format],
    calibration: CalibrationText | None,
    *,
    force: bool,
) -> PackResult:
    with _bars() as bars:
        return pack(
            skeleton,
            formats,
            calibration=calibration,
            dense_formats=dense_formats,
            force=force,
            progress=bars("packing", format_bytes),
            calibrating=bars("calibrating", lambda windows: f"{windows} windows"),
        )


def _calibration(
    skeleton: Skeleton, text: Path, tokens: int, context: int, memory: str | None
) -> CalibrationText:
    tokenizer = read_tokenizer(skeleton.checkpoint.folder)
    windows = read_windows(skeleton.model, text, tokenizer, context, tokens)
    return CalibrationText(
        text=text.name,
        digest=windows.digest,
        windows=windows,
        memory=None if memory is None else parse_bytes(memory),
    )


def _say_result(made: PackResult) -> None:
    skipped = f", {made.skipped} exist already" if made.skipped else ""
    replaced = f" ({made.replaced} replacing files encoded without it)" if made.replaced else ""
    by = f", calibrated on {made.text}{replaced}" if made.text else ""
    say(
        f"wrote {made.files} files, {format_bytes(made.bytes_written)}{by}{skipped}, in "
        f"{made.seconds:.1f} s: {made.folder}"
    )
    of = "outputs'" if made.text else "weights'"
    for name, error in made.relative_errors.items():
        if name == NATIVE.name:
            say(f"{name}: the checkpoint's own codes, as slots hold them")
        else:
            say(f"{name}: squared error {error:.2e} of the {of} squares, mean over experts")
    for name, error in made.dense_errors.items():
        say(f"dense {name}: squared error {error:.2e} of the {of} squares, mean over matrices")


def _check(
    skeleton: Skeleton,
    chosen: Sequence[Format] | None,
    dense: Sequence[Format] | None,
    *,
    as_json: bool,
) -> None:
    with _bars() as bars:
        progress = bars("checking", format_bytes)
        found = check_packed(skeleton, chosen, progress, dense_formats=dense)
    if as_json:
        print_json(found.as_dict())
    if found.problems:
        more = f" (and {len(found.problems) - 3} more)" if len(found.problems) > 3 else ""
        raise CheckpointError("; ".join(found.problems[:3]) + more)
    if not as_json:
        experts = f"{found.experts:,} experts in {', '.join(found.formats)}, " * bool(found.formats)
        names = ", ".join(found.dense_formats)
        dense_too = f"{found.matrices:,} dense matrices in {names}, " * bool(names)
        say(
            f"sound: {experts}{dense_too}{found.files} files, "
            f"{format_bytes(found.bytes_read)}: {found.folder}"
        )


def _default(skeleton: Skeleton, *, calibrated: bool) -> str:
    own = held_formats(skeleton.blocks) and not calibrated
    return NATIVE.name if own else _DEFAULT


def _formats(text: str | None) -> list[Format] | None:
    return None if text is None else [parse_format(name.strip()) for name in text.split(",")]


@contextmanager
def _bars() -> Iterator[Callable[[str, Callable[[int], str]], Progress]]:
    """Yield a function that returns a progress bar for a name and a format of its numbers."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def make(what: str, words: Callable[[int], str]) -> Progress:
            def show(done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, amount="")
                amount = f"{words(done)} of {words(total)}"
                bar.update(tasks[what], completed=done, total=total, amount=amount)

            return show

        yield make


@cache.command(name="ls", help="Show what the cache folder holds, and which of it can go.")
def cache_ls(as_json: Json = False) -> None:
    """Print the entries, the largest first."""
    found = entries()
    if as_json:
        total = sum(one.nbytes for one in found)
        rows = [one.as_dict() for one in found]
        print_json({"folder": str(cache_root()), "bytes": total, "entries": rows})
    elif found:
        Console().print(_cache_table(found))
    else:
        say(f"{cache_root()} is empty")


@cache.command(name="rm", help="Remove entries by name, or all that were made from a checkpoint.")
def cache_rm(
    names: Annotated[list[str], typer.Argument(help="Names of `ls`, or models.")],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Everything can be made again by the command that made it."""
    wanted = [_place_of(name) for name in names]
    chosen = [(one, f"made by `{KINDS[one.kind]}`") for one in find(wanted, entries())]
    _remove_entries(chosen, (), dry_run=dry_run, yes=yes, as_json=as_json)


@cache.command(name="prune", help="Remove what nothing reads: of other versions, of lost models.")
def cache_prune(
    older_than: Annotated[
        float | None, option("Also remove what was written more than DAYS ago.", min=0)
    ] = None,
    keep: Annotated[
        str | None, option("Also remove the oldest until this size is left, such as 50GiB.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Files that killed processes left are removed too."""
    found = entries()
    keep_bytes = None if keep is None else parse_bytes(keep)
    chosen = unneeded(found, older_than_days=older_than, keep_bytes=keep_bytes)
    paths = {one.path for one, _ in chosen}
    others = [one for one in found if one.leftovers and one.path not in paths]
    _remove_entries(chosen, others, dry_run=dry_run, yes=yes, as_json=as_json)


def _place_of(name: str) -> str:
    """Return a model's folder or file, for a name that a command takes; other names as they are."""
    with suppress(MoefitError):
        return str(locate(name).absolute())
    return name


def _remove_entries(
    chosen: Sequence[tuple[Entry, str]],
    unfinished: Sequence[Entry],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Ask, then remove entries, and from others the files that killed processes left."""
    left = sum(one.leftover_bytes for one in unfinished)
    total = sum(one.nbytes for one, _ in chosen) + left
    for one, reason in chosen:
        say(f"{one.name}: {format_bytes(one.nbytes)}, {one.source or 'unknown source'}; {reason}")
    if left:
        say(f"files that were not finished: {format_bytes(left)}")
    if total and not dry_run:
        _ask(f"Remove {format_bytes(total)}?", yes=yes)
        for one, _ in chosen:
            remove(one)
        total += sum(map(remove_leftovers, unfinished)) - left
    if as_json:
        rows = [one.as_dict() | {"reason": reason} for one, reason in chosen]
        print_json({"removed": not dry_run, "bytes": total, "entries": rows})
    else:
        say(f"{'would free' if dry_run else 'freed'} {format_bytes(total)}")


def _ask(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("removing asks first, and standard input is no terminal; give --yes")
    typer.confirm(question, abort=True, err=True)


def _cache_table(found: Sequence[Entry]) -> Table:
    total = format_bytes(sum(one.nbytes for one in found))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.title = f"{cache_root()}: {total}"
    for name in ("entry", "size", "written", "holds", "made from"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for one in found:
        kind, _, rest = one.name.partition("/")
        written = datetime.fromtimestamp(one.changed).strftime("%Y-%m-%d %H:%M")
        source = Text(one.source)  # not a string: a path may have brackets
        if one.stale:
            source.append(f"\n{one.stale}", style="yellow")
        holds = Text(", ".join(one.contents))
        table.add_row(f"{kind}/{rest[:12]}", format_bytes(one.nbytes), written, holds, source)
    return table
