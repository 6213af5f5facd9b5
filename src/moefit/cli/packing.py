"""The command that makes and checks packed stores: pack."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from moefit.api import folder_of
from moefit.cli.app import Dtype, Json, Model, app, console, print_json, say
from moefit.errors import CheckpointError, ConfigError
from moefit.formats.format import FORMATS, Format, parse_format
from moefit.serve.budget import format_bytes
from moefit.serve.packed_check import check_packed
from moefit.serve.packing import Progress, pack
from moefit.serve.skeleton import Skeleton, build

_DEFAULT = "int8,int4"


@app.command(name="pack", help="Write a model's experts once in the formats they are served in.")
def pack_model(
    model: Model,
    formats: Annotated[
        str | None,
        typer.Option(
            help=f"of {', '.join(name for name in FORMATS if name != 'native')}, with commas; "
            f"{_DEFAULT} if not given, with --check all that are there"
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="the checkpoint's own if not given")] = None,
    check: Annotated[bool, typer.Option("--check", help="verify what is packed")] = False,
    force: Annotated[bool, typer.Option("--force", help="make again what is there")] = False,
    as_json: Json = False,
) -> None:
    """Resumes where it stopped: finished files are skipped."""
    if check and force:
        raise ConfigError("--check changes nothing and --force makes anew; give one of them")
    chosen = _formats(formats if formats is not None or check else _DEFAULT)
    skeleton = build(folder_of(model), dtype.torch if dtype else None)
    if check:
        _check(skeleton, chosen, as_json=as_json)
        return
    assert chosen is not None
    with _bar("packing") as progress:
        made = pack(skeleton, chosen, force=force, progress=progress)
    if as_json:
        print_json(made.as_dict())
        return
    skipped = f", {made.skipped} were there already" if made.skipped else ""
    say(
        f"wrote {made.files} files, {format_bytes(made.bytes_written)}{skipped}, in "
        f"{made.seconds:.1f} s: {made.folder}"
    )
    for name, error in made.relative_errors.items():
        say(f"{name}: squared error {error:.2e} of the weights' squares, mean over experts")


def _check(skeleton: Skeleton, chosen: Sequence[Format] | None, *, as_json: bool) -> None:
    with _bar("checking") as progress:
        found = check_packed(skeleton, chosen, progress)
    if as_json:
        print_json(found.as_dict())
    if found.problems:
        more = f" (and {len(found.problems) - 3} more)" if len(found.problems) > 3 else ""
        raise CheckpointError("; ".join(found.problems[:3]) + more)
    if not as_json:
        say(
            f"sound: {found.experts:,} experts in {', '.join(found.formats)}, {found.files} files, "
            f"{format_bytes(found.bytes_read)}: {found.folder}"
        )


def _formats(text: str | None) -> list[Format] | None:
    return None if text is None else [parse_format(name.strip()) for name in text.split(",")]


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:

        def show(done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(what)
            bar.update(task, completed=done, total=total)

        yield show
