"""The command `report`: one page about training runs, which is also their model card."""

from pathlib import Path
from typing import Annotated

import typer

from moefit.cli.app import ModeName, advanced, command, console, option, say
from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.report.facts import Measurements, gather
from moefit.report.write import HTML, write_page

_BOTH = [ModeName.exact, ModeName.virtual]


@command("report")
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Training runs, model folders, or 'reference'.")
    ],
    out: Annotated[Path | None, option("Folder of the page. Default: report in the run.")] = None,
    text: Annotated[
        Path | None, option("UTF-8 text for perplexity. Default: the held-out standard library.")
    ] = None,
    rule: Annotated[
        list[str] | None, option("Rules to measure perplexity by; may be repeated.")
    ] = None,
    max_tokens: Annotated[
        int, option("Tokens to measure perplexity on; 0 leaves it out.", min=0)
    ] = 8192,
    memory: Annotated[
        list[str] | None, option("Budget to measure serving with; may be repeated.")
    ] = None,
    mode: Annotated[
        list[ModeName] | None,
        advanced("Modes to measure serving in; may be repeated. Default: exact and virtual."),
    ] = None,
    license: Annotated[
        str | None, option("Licence for the card's metadata, such as apache-2.0.")
    ] = None,
) -> None:
    """Write Markdown with the Hub's metadata, HTML, and pictures."""
    if max_tokens == 1:
        raise ConfigError("--max-tokens 1 predicts nothing that is compared; give 2 or more, or 0")
    if text is not None and not text.is_file():
        raise ConfigError(f"there is no file {str(text)!r}; give a text file, or leave out --text")
    measured = Measurements(
        text=text,
        max_tokens=max_tokens,
        rules=[Rule.parse(one) for one in rule or []],
        budgets=memory or [],
        modes=[one.value for one in mode or _BOTH],
    )
    with console.status("measuring") as status:

        def show(name: str, done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        known = [gather(one, measured, show) for one in runs]
        folder = out or page_folder(runs[0])
        card = write_page(known, folder, license)
    say(f"wrote {card} and {card.with_name(HTML)}")


def page_folder(run: str) -> Path:
    """Return the page's folder: `report` in the run, or here for a model that is elsewhere."""
    home = Path(run).expanduser()
    return (home if home.is_dir() else Path()) / "report"
