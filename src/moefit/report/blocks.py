"""A page as blocks, written as Markdown and as HTML with its pictures inside."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; }
  pre { background: #262626; }
  th, td { border-color: #444; }
  img { background: #fff; }
}
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Lines for a terminal."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; the first column is text, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file in the page's folder."""

    file: Path
    text: str


Block = Heading | Paragraph | Code | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the page as Markdown; pictures are links to files beside it.

    >>> print(to_markdown([Heading("A", 1), Table(["name", "value"], [["x|y", "1"]])]))
    # A
    <BLANKLINE>
    | name | value |
    |---|---:|
    | x\\|y | 1 |
    <BLANKLINE>
    """
    return "\n\n".join(_markdown(one) for one in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(file, text):
            return f"![{text}]({file.name})"
        case Table(header, rows):
            rule = "|---" + "|---:" * (len(header) - 1) + "|"
            return "\n".join([_line(header), rule, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """Return the page as one HTML file that needs no others."""
    body = "\n".join(_html(one) for one in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(file, text):
            data = base64.b64encode(file.read_bytes()).decode()
            source = f"data:{_MEDIA[file.suffix]};base64,{data}"
            return f'<p><img src="{source}" alt="{html.escape(text, quote=True)}"></p>'
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(one)}</th>" for one in header)
            cells = ["".join(f"<td>{html.escape(one)}</td>" for one in row) for row in rows]
            body = "".join(f"<tr>{one}</tr>" for one in cells)
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
