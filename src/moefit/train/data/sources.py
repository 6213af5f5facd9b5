"""Resolve `data.sources` to files and datasets, with the same names and order on every machine."""

import difflib
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moefit.errors import DataError
from moefit.train.settings import STDLIB

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIX = ".jsonl"
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*PLAIN_SUFFIXES, JSONL_SUFFIX, PARQUET_SUFFIX)

HUB_PREFIX = "hf:"
# `encodings` contains generated tables.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A file: its name relative to its source, and its absolute path with links resolved."""

    name: str
    path: Path
    in_stdlib: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """One split of a Hugging Face dataset; `config` None is its only configuration."""

    dataset: str
    config: str | None = None
    split: str

    @property
    def name(self) -> str:
        """The entry in `data.sources`."""
        config = f"@{self.config}" if self.config else ""
        return f"{HUB_PREFIX}{self.dataset}{config}:{self.split}"


def parts(
    sources: Sequence[str], *, excluding: Sequence[str] = ()
) -> list[list[TextFile | HubDataset]]:
    """Return the files and datasets of each of `sources` without those of `excluding`.

    A file that two sources contain is returned once; otherwise it could be trained on under one
    name and held out under the other.

    Raises:
        DataError: A source does not exist, cannot be read, or contains no file of a known type.
    """
    seen = {_identity(part) for source in excluding for part in _parts_of(source)}
    found: list[list[TextFile | HubDataset]] = []
    for source in sources:
        found.append([])
        for part in _parts_of(source):
            if _identity(part) not in seen:
                seen.add(_identity(part))
                found[-1].append(part)
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
    except OSError as error:  # no permission, or the name is too long
        raise DataError(
            f"{source!r} cannot be accessed ({error.strerror or error}); "
            "make it readable or give another file or folder"
        ) from error
    raise DataError(f"{source!r} does not exist; {_suggestion(source, path)}")


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
            "or hf:DATASET@CONFIG, followed by :SPLIT for a split other than train"
        )
    return HubDataset(dataset=dataset, config=config or None, split=split or "train")


def _folder(source: str, root: Path) -> list[TextFile | HubDataset]:
    """Return all files of known types in a folder, except hidden ones."""
    every = list(_walk(root))
    readable = [path for path in every if path.suffix.lower() in SUFFIXES]
    if not readable:
        counts = Counter(path.suffix.lower() or "no extension" for path in every)
        held = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(5)) or "nothing"
        raise DataError(
            f"folder {source!r} contains {held}, but no file of a supported type "
            f"({', '.join(SUFFIXES)}); convert a file to one of these or give another folder"
        )
    return [
        TextFile(name=f"{root.name}/{path.relative_to(root).as_posix()}", path=path.resolve())
        for path in readable
    ]


def _single_file(source: str, path: Path) -> TextFile:
    if path.suffix.lower() not in SUFFIXES:
        suffix = f"the unknown extension {path.suffix}" if path.suffix else "no extension"
        raise DataError(
            f"{source!r} has {suffix}; convert it to one of {', '.join(SUFFIXES)} "
            f"(plain text: rename it to {path.stem + '.txt'!r})"
        )
    return TextFile(name=path.name, path=path.resolve())


def _walk(root: Path, *, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Return all files below `root` sorted by path, without hidden ones and `skip` folders."""

    def on_error(error: OSError) -> None:
        raise DataError(
            f"folder {error.filename} cannot be listed ({error.strerror}); "
            "make it readable or give its files one by one"
        ) from error

    found: list[Path] = []
    for folder, subfolders, files in os.walk(root, onerror=on_error):
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in skip]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _suggestion(source: str, path: Path) -> str:
    """Suggest names similar to the first part of a path that does not exist."""
    if difflib.get_close_matches(source, [STDLIB]):
        return f"did you mean {STDLIB!r}, the running Python's standard library?"
    while not path.parent.is_dir():
        path = path.parent
    folder = path.parent
    candidates = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(path.name, candidates, n=3)
    if close:
        return f"the nearest names in {folder} are: {', '.join(close)}"
    shown = ", ".join(candidates[:5]) or "nothing"
    return f"{folder} contains {shown}{', ...' if len(candidates) > 5 else ''}"
