"""What moefit keeps in its cache folder, and what of it can be removed.

Everything in the folder can be made again: packed stores by `moefit pack`, profiles by
`moefit profile`, tokens of a training text by `moefit train`. An entry is one folder of one of
these kinds. Entries are stale if their checkpoint is no longer where it was, so that nothing reads
them unless it was moved, or if they have a layout or an encoder of another version.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefit.checkpoint.model_folder import settings_file
from moefit.errors import CheckpointError, ConfigError, MoefitError
from moefit.folders import cache_root, exclusive_folder
from moefit.quant.format import parse_format
from moefit.serve.packed.dense import DENSE
from moefit.serve.packed.file import RECORDING, WRITING, read_packed
from moefit.serve.prediction.probes import FILE, source_of

KINDS = {"packed": "moefit pack", "profiles": "moefit profile", "data": "moefit train"}
"""Folders of the cache, and the command that makes what is in them."""
_DAY = 86400.0
_FRESH = 3600.0  # seconds after which an unfinished file is of a process that was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One folder in the cache.

    Attributes:
        kind: One of `KINDS`.
        path: The folder.
        nbytes: Size of its files in bytes.
        changed: When its newest file was written, in seconds since 1970.
        source: The checkpoint that it was made from, as far as it is known.
        contents: What it holds, such as names of formats.
        stale: Why nothing is expected to read it; empty if something may.
        leftovers: Files that a killed process did not finish.
    """

    kind: str
    path: Path
    nbytes: int
    changed: float
    source: str = ""
    contents: tuple[str, ...] = ()
    stale: str = ""
    leftovers: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Return the name that `find` takes."""
        return f"{self.kind}/{self.path.name}"

    @property
    def leftover_bytes(self) -> int:
        """Return the bytes of `leftovers`."""
        return sum(path.stat().st_size for path in self.leftovers if path.is_file())

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        values = asdict(self) | {"name": self.name, "path": str(self.path)}
        return values | {"leftovers": [str(path) for path in self.leftovers]}


def entries() -> list[Entry]:
    """Return all entries, the largest first."""
    found = [_entry(kind, folder) for kind in KINDS for folder in _subfolders(cache_root() / kind)]
    return sorted(found, key=lambda entry: (-entry.nbytes, entry.name))


def find(wanted: Sequence[str], among: Sequence[Entry]) -> list[Entry]:
    """Return the entries that the user names.

    Args:
        wanted: Each a name such as `packed/0123abcd`, the beginning of one, or a checkpoint's
            folder, which stands for everything that was made from it.
        among: All entries.

    Raises:
        ConfigError: Nothing has such a name, or several entries begin with it.
    """
    chosen: dict[Path, Entry] = {}
    for name in wanted:
        place = str(Path(name).expanduser().absolute())
        found = [one for one in among if one.source and one.source in (name, place)]
        found = found or [one for one in among if _begins(one, name)]
        exact = [one for one in found if name in (one.name, one.path.name)]
        if not found:
            names = ", ".join(one.name for one in among[:3]) or "it is empty"
            raise ConfigError(
                f"the cache has no entry {name!r}; `moefit cache ls` shows all, such as: {names}"
            )
        if len(found) > 1 and not exact and not all(one.source == place for one in found):
            names = ", ".join(one.name for one in found)
            raise ConfigError(f"{name!r} may be {names}; give more of the name")
        chosen |= {one.path: one for one in exact or found}
    return list(chosen.values())


def unneeded(
    among: Sequence[Entry],
    *,
    older_than_days: float | None = None,
    keep_bytes: int | None = None,
    now: float | None = None,
) -> list[tuple[Entry, str]]:
    """Return the entries that housekeeping removes, with the reason of each.

    Args:
        among: All entries.
        older_than_days: Remove what was written before as many days too.
        keep_bytes: Remove the oldest of what is left until the rest is no larger.
        now: The present time, in seconds since 1970. Default: the clock's.
    """
    now = time.time() if now is None else now
    chosen = {one.path: (one, one.stale) for one in among if one.stale}
    for one in among:
        days = (now - one.changed) / _DAY
        if older_than_days is not None and days > older_than_days:
            chosen.setdefault(one.path, (one, f"written {days:.0f} days ago"))
    rest = sorted((one for one in among if one.path not in chosen), key=lambda one: one.changed)
    total = sum(one.nbytes for one in rest)
    for one in rest:
        if keep_bytes is None or total <= keep_bytes:
            break
        chosen[one.path] = (one, "the oldest beyond the size to keep")
        total -= one.nbytes
    return list(chosen.values())


def remove(entry: Entry) -> None:
    """Remove an entry.

    Raises:
        ConfigError: A process is writing it.
        CheckpointError: It cannot be removed.
    """
    with exclusive_folder(entry.path, busy=f"{entry.name} is being written; wait for its end"):
        shutil.rmtree(entry.path, onerror=_cannot_remove)


def remove_leftovers(entry: Entry) -> int:
    """Remove the files that killed processes left, unless one is writing now; return the bytes."""
    removed = 0
    with suppress(ConfigError), exclusive_folder(entry.path, busy="it is being written"):
        for path in entry.leftovers:
            with suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                removed += size
    return removed


def _cannot_remove(function: object, path: str, error: Any) -> None:
    reason = getattr(error[1], "strerror", None) or error[1]
    raise CheckpointError(f"cannot remove {path}: {reason}; check the folder's permissions")


def _subfolders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if path.is_dir())


def _begins(entry: Entry, name: str) -> bool:
    return bool(name) and (entry.name.startswith(name) or entry.path.name.startswith(name))


def _entry(kind: str, folder: Path) -> Entry:
    nbytes, changed, leftovers = 0, 0.0, []
    for path in folder.rglob("*"):
        with suppress(OSError):  # files come and go while other processes work
            if path.is_file():
                state = path.stat()
                nbytes += state.st_size
                changed = max(changed, state.st_mtime)
                unfinished = path.name.endswith((WRITING, ".part"))
                if unfinished and state.st_mtime < time.time() - _FRESH:
                    leftovers.append(path)
    about = {"packed": _packed, "profiles": _profiles}.get(kind, lambda folder: ("", (), ""))
    source, contents, stale = about(folder)
    return Entry(
        kind=kind,
        path=folder,
        nbytes=nbytes,
        changed=changed or folder.stat().st_mtime,
        source=source,
        contents=contents,
        stale=stale,
        leftovers=tuple(sorted(leftovers)),
    )


def _packed(folder: Path) -> tuple[str, tuple[str, ...], str]:
    """Return source, formats and the reason why a packed store is never read, by its headers."""
    source, formats, reasons = _usage_source(folder), [], []
    if source:
        formats.append("use counts")
    if fitted_to := _probes_source(folder):
        source = fitted_to
        formats.append("probes")
    for one in _subfolders(folder):
        is_dense = one.name.startswith(DENSE)
        pattern = "*.safetensors" if is_dense else "block-*.safetensors"
        first = next(iter(sorted(one.glob(pattern))), None)
        if first is None:
            if one.name == RECORDING:
                formats.append("a recording for calibration")
            continue
        try:
            metadata = read_packed(first).metadata
        except CheckpointError:
            reasons.append(f"{one.name} has the layout of another version, or is damaged")
            continue
        source = metadata.source
        if _encoder(metadata.format) == metadata.encoder:
            name = f"dense {metadata.format}" if is_dense else one.name
            formats.append(f"{name} with text" if metadata.calibration else name)
        else:
            reasons.append(f"{one.name} was encoded by another version")
    if source and not settings_file(Path(source)).is_file():
        return source, tuple(formats), f"its checkpoint is no longer in {source}"
    return source, tuple(formats), "" if formats else "; ".join(reasons) or "it is empty"


def _usage_source(folder: Path) -> str:
    """Return the checkpoint whose use counts a server left here; empty if there are none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((folder / "usage.json").read_text(encoding="utf-8"))["source"])
    return ""


def _probes_source(folder: Path) -> str:
    """Return the checkpoint that probes in this folder were fitted to; empty without probes."""
    with suppress(MoefitError, OSError):
        return source_of(folder / FILE)
    return ""


def _encoder(format: str) -> str | None:
    with suppress(ConfigError):
        return parse_format(format).encoder
    return None


def _profiles(folder: Path) -> tuple[str, tuple[str, ...], str]:
    """Return source and number of the profiles of a checkpoint."""
    source, files = "", sorted(folder.glob("*.json"))
    for file in files:
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            source = str(json.loads(file.read_text(encoding="utf-8"))["facts"]["source"])
    contents = (f"{len(files)} profile{'s' if len(files) != 1 else ''}",)
    if source and Path(source).is_absolute() and not Path(source).exists():
        return source, contents, f"its checkpoint is no longer in {source}"
    return source, contents, ""
