"""Write a page: a model card in Markdown, HTML, and the pictures of both."""

from collections.abc import Sequence
from pathlib import Path

from moefit.errors import CheckpointError
from moefit.report.blocks import to_html, to_markdown
from moefit.report.facts import RunFacts, labels_of
from moefit.report.metadata import front_matter
from moefit.report.sections import page

CARD, HTML = "README.md", "index.html"


def write_page(runs: Sequence[RunFacts], folder: Path, license: str | None = None) -> Path:
    """Write the page of some runs.

    Args:
        runs: What is known of them. The metadata of the card are those of the first.
        folder: Created if necessary; files of the same names are replaced.
        license: Of the first model, for the metadata.

    Returns:
        The card.

    Raises:
        CheckpointError: A file cannot be written.
        ConfigError: A picture cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        blocks = page(runs, folder)
        title = " and ".join(labels_of(runs))
        text = front_matter(runs[0], license) + to_markdown(blocks)
        (folder / CARD).write_text(text, encoding="utf-8")
        (folder / HTML).write_text(to_html(blocks, title), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the page cannot be written into {folder}: {error.strerror or error}; give another "
            "--out"
        ) from error
    return folder / CARD
