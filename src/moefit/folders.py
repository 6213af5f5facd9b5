"""Folders that several processes may come to: where the cache is, and having one for oneself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moefit.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes in one folder go unnoticed there
    fcntl = None


def cache_root() -> Path:
    """Where moefit keeps what it can make again: $XDG_CACHE_HOME/moefit, or ~/.cache/moefit."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moefit"


def try_lock(descriptor: int) -> bool:
    """Whether this process has the file for itself from now on; the lock ends with the process."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks; that must not forbid the work
        return True
    return True


@contextmanager
def alone_in(folder: Path, *, busy: str, lock: str = ".lock") -> Iterator[None]:
    """Make the folder and be the only process at some work in it; `lock` is the file that says so.

    Raises ConfigError with the text `busy` if another process is at it, and CheckpointError if the
    folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / lock).open("ab")
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder}: {error.strerror or error}; set XDG_CACHE_HOME to a "
            "folder that can be written to"
        ) from error
    with file:
        if not try_lock(file.fileno()):
            raise ConfigError(busy)
        yield
