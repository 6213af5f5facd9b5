"""The command `push`: upload a model with its card to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from moefit.api import folder_of
from moefit.cli.app import command, console, option, say
from moefit.cli.options import Model
from moefit.cli.scores.report import page_folder
from moefit.report.facts import name_of
from moefit.report.upload import files_of, push
from moefit.report.write import CARD


@command("push")
def push_model(
    model: Model,
    repo: Annotated[str, typer.Argument(help="Name of the repository, such as me/model.")],
    report: Annotated[
        Path | None, option("Folder that moefit report wrote. Default: report in the run.")
    ] = None,
    private: Annotated[
        bool, option("Make the repository private if it is created.", "--private")
    ] = False,
    revision: Annotated[str | None, option("Branch to upload to. Default: main.")] = None,
) -> None:
    """Upload weights, configuration, tokenizer and card."""
    page = report or page_folder(model)
    known = page if (page / CARD).is_file() else None
    folder = folder_of(model)
    names = ", ".join(sorted(files_of(folder, known)))
    if known is None:
        say(f"note: there is no card in {page}; `moefit report {model}` writes one")
    with console.status(f"uploading {names}"):
        how = {"page": known, "name": name_of(model), "private": private, "revision": revision}
        address = push(folder, repo, **how)
    say(f"uploaded {names}: {address}")
