"""Find the files that a source names.

Owns what may stand in `data.sources` and what each entry means: `stdlib`, a file, a folder, or
`hf:DATASET[@CONFIG][:SPLIT]`. Gives parts, in an order and under names that are the same on every
machine. Knows nothing of what is inside a file: reading is corpus.py's.
"""

import difflib
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moefit.errors import DataError
from moefit.train.config import STDLIB

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIX = ".jsonl"
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*PLAIN_SUFFIXES, JSONL_SUFFIX, PARQUET_SUFFIX)

HUB_PREFIX = "hf:"
# `encodings` is a folder of generated tables, which nobody wrote and nobody would read.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A file; `name` is relative to its source, `path` absolute with links resolved."""

    name: str
    path: Path
    in_stdlib: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """One split of a dataset of the Hugging Face hub; `config` is None if it has but one."""

    dataset: str
    config: str | None = None
    split: str

    @property
    def name(self) -> str:
        """As it may be written in `data.sources`."""
        config = f"@{self.config}" if self.config else ""
        return f"{HUB_PREFIX}{self.dataset}{config}:{self.split}"


def parts(sources: Sequence[str], *, excluding: Sequence[str] = ()) -> list[TextFile | HubDataset]:
    """The files and datasets of `sources`, each once, without those of `excluding`.

    Once, even when two sources reach it (a folder, and a file within it): under two names it
    could otherwise be trained on as one and held out as the other.
    """
    seen = {_identity(part) for source in excluding for part in _parts_of(source)}
    found: list[TextFile | HubDataset] = []
    for source in sources:
        for part in _parts_of(source):
            if _identity(part) not in seen:
                seen.add(_identity(part))
                found.append(part)
    return found


def _identity(part: TextFile | HubDataset) -> Path | str:
    return part.path if isinstance(part, TextFile) else part.name


def _parts_of(source: str) -> list[TextFile | HubDataset]:
    if source == STDLIB:
        return _stdlib()
    if source.startswith(HUB_PREFIX):
        return [_hub_dataset(source)]
    path = Path(os.path.abspath(Path(source).expanduser()))
    try:
        if path.is_dir():
            return _folder(source, path)
        if path.exists():
            return [_single_file(source, path)]
    except OSError as error:  # no permission to look, or a name too long to be one
        raise DataError(
            f"{source!r} cannot be looked at ({error.strerror or error}); "
            f"make it readable or give another file or folder"
        ) from error
    raise DataError(f"{source!r} does not exist; {_nearest(source, path)}")


def _stdlib() -> list[TextFile | HubDataset]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        TextFile(
            name=f"{STDLIB}/{path.relative_to(root).as_posix()}",
            path=path.resolve(),
            in_stdlib=True,
        )
        for path in _walk(root, skip=NOT_STDLIB)
        if path.suffix == ".py"
    ]


def _hub_dataset(source: str) -> HubDataset:
    which, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    dataset, at, config = which.partition("@")
    if not dataset or (at and not config):
        raise DataError(
            f"{source!r} names no {'configuration' if dataset else 'dataset'}; write hf:DATASET "
            "or hf:DATASET@CONFIG, and :SPLIT behind it if not train is meant"
        )
    return HubDataset(dataset=dataset, config=config or None, split=split or "train")


def _folder(source: str, root: Path) -> list[TextFile | HubDataset]:
    """Every readable file below, except hidden ones (.git and the like)."""
    every = list(_walk(root))
    readable = [path for path in every if path.suffix.lower() in SUFFIXES]
    if not readable:
        counts = Counter(path.suffix.lower() or "no extension" for path in every)
        held = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) or "nothing"
        raise DataError(
            f"folder {source!r} holds {held}, but none of what can be read: "
            f"{', '.join(SUFFIXES)}; convert a file to one of these or give another folder"
        )
    return [
        TextFile(name=f"{root.name}/{path.relative_to(root).as_posix()}", path=path.resolve())
        for path in readable
    ]


def _single_file(source: str, path: Path) -> TextFile:
    if path.suffix.lower() not in SUFFIXES:
        ending = f"ends in {path.suffix}" if path.suffix else "has no extension"
        raise DataError(
            f"{source!r} {ending}, which does not say how it can be read; "
            f"convert it to one of {', '.join(SUFFIXES)} (plain text: rename it to "
            f"{path.stem + '.txt'!r})"
        )
    return TextFile(name=path.name, path=path.resolve())


def _walk(root: Path, *, skip: frozenset[str] = frozenset()) -> list[Path]:
    """All files below `root`, sorted by their path within it; no hidden ones, no `skip` folders."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"folder {error.filename} cannot be listed ({error.strerror}); "
            f"make it readable or give the files one by one"
        ) from error

    found: list[Path] = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in skip]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _nearest(source: str, wanted: Path) -> str:
    """What a mistyped path may have meant, looked for where the path stops existing."""
    if difflib.get_close_matches(source, [STDLIB]):
        return f"did you mean {STDLIB!r}, the running Python's standard library?"
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    folder = wanted.parent
    candidates = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(wanted.name, candidates, n=3)
    if close:
        return f"the nearest names in {folder} are: {', '.join(close)}"
    shown = ", ".join(candidates[:5]) or "nothing"
    return f"{folder} holds {shown}{', ...' if len(candidates) > 5 else ''}"
