"""The commands `law list` and `law fit`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from moefit.advise.fitting import HUBER, Fit, FitSettings, fit_law, law_of
from moefit.advise.forms import CHINCHILLA, CLARK, FORMS, JOINT, YUN
from moefit.advise.laws import SUFFIXES, law_yaml, leverage_law, published_laws
from moefit.advise.runs import OPTIONAL, REQUIRED, read_runs
from moefit.advise.shapes import Count
from moefit.cli.advise.tables import check_new_file, draw_fit, fit_table, held_out_line, laws_table
from moefit.cli.app import (
    COMMANDS,
    Json,
    advanced,
    app,
    option,
    print_json,
    progress_bar,
    say,
)
from moefit.cli.plan_tables import check_picture
from moefit.errors import ConfigError

law = typer.Typer(no_args_is_help=True, help=COMMANDS["law"][1])
app.add_typer(law, name="law")


class FormName(StrEnum):
    """Forms that can be fitted."""

    yun = YUN.name
    clark = CLARK.name
    joint = JOINT.name
    chinchilla = CHINCHILLA.name


class HoldOut(StrEnum):
    """Which runs are held out."""

    none = "none"
    largest = "largest"


@law.command(name="list", help="Show the published laws: source, meaning of N and D, range, error.")
def law_list(as_json: Json = False) -> None:
    """Print all laws of the data file."""
    laws = published_laws()
    if as_json:
        leverage = leverage_law().model_dump(mode="json")
        print_json({**{name: law_yaml(one) for name, one in laws.items()}, "leverage": leverage})
        return
    Console().print(laws_table(list(laws.values())))
    say("leverage predicts no loss and is shown beside others: " + leverage_law().source)


@law.command(name="fit", help="Fit a law to runs: a CSV file, or folders of `moefit train`.")
def law_fit(
    runs: Annotated[
        list[Path], typer.Argument(help="RUNS.csv (or .csv.gz), or folders of `moefit train`.")
    ],
    form: Annotated[FormName, option("Formula to fit; `moefit law list` shows all.")],
    hold_out: Annotated[
        HoldOut, option("largest: also fit without the largest runs; report errors on them.")
    ] = HoldOut.none,
    save: Annotated[Path | None, option("Write the law here, for `moefit advise --law`.")] = None,
    picture: Annotated[Path | None, option("Draw predicted over measured losses.")] = None,
    drop: Annotated[
        list[str] | None, option("Name of a run to leave out; may be repeated.")
    ] = None,
    column: Annotated[
        list[str] | None,
        option("The file's name of a column, such as tokens=D; may be repeated."),
    ] = None,
    counts: Annotated[Count, advanced("Which parameters N counts.")] = Count.active_with_embeddings,
    bootstrap: Annotated[int, advanced("Resamplings for intervals; 0 for none.", min=0)] = 200,
    huber: Annotated[
        float,
        advanced("Residual of ln L from which it counts linearly; 1 is least squares.", min=1e-9),
    ] = HUBER,
    seed: Annotated[int, advanced("Random seed of resamplings.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Print coefficients with intervals, and errors on runs left out."""
    if picture is not None:
        check_picture(picture, 1)
    if save is not None:
        _check_law_file(save)
    if column and any(one.is_dir() for one in runs):
        raise ConfigError(
            "--column names columns of a CSV file, and a folder has none; leave it out"
        )
    found = read_runs(runs, counts=counts, columns=_columns(column or []), drop=drop or [])
    for name, reason in found.left_out.items():
        say(f"left out: {name}: {reason}")
    with progress_bar("fitting") as progress:
        fit = fit_law(
            found,
            FORMS[form.value],
            FitSettings(
                bootstrap=bootstrap,
                hold_out_largest=hold_out is HoldOut.largest,
                huber=huber,
                seed=seed,
            ),
            progress,
        )
    if as_json:
        print_json(fit.as_dict())
    else:
        _print_fit(fit)
    if picture is not None:
        draw_fit(fit, picture)
        say(f"picture: {picture}")
    if save is not None:
        _save(fit, save, ", ".join(map(str, runs)))


def _print_fit(fit: Fit) -> None:
    Console().print(fit_table(fit))
    say(f"residuals: {fit.rms_log10:.4f} of log10 L (rms) on {len(fit.runs.used)} runs")
    if fit.left_out is not None:
        say(held_out_line("leaving out an eighth of the runs at a time", fit.left_out))
    if fit.extrapolated is not None:
        say(held_out_line("largest runs, fitted to the others", fit.extrapolated))


def _save(fit: Fit, path: Path, source: str) -> None:
    text = yaml.safe_dump(law_yaml(law_of(fit, path.stem, source)), sort_keys=False)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; name a file in a folder that can be written to"
        ) from error
    say(f"wrote {path}; next: moefit advise --law {path}")


def _check_law_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--save {path}: a law is read back from a .yaml file only; give --save "
            f"{path.with_suffix('.yaml')}"
        )
    check_new_file(path)


def _columns(given: list[str]) -> dict[str, str]:
    known = (*REQUIRED, *OPTIONAL)
    columns: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not value or name not in known:
            raise ConfigError(
                f"--column {one!r}: write NAME=COLUMN, with NAME one of {', '.join(known)}"
            )
        columns[name] = value
    return columns
