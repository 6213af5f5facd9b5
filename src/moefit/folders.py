"""The cache folder, folders that are written whole or not at all, locks, and kinds of files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moefit.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: without locks
    fcntl = None


def cache_root() -> Path:
    """Return the folder for reproducible files: $XDG_CACHE_HOME/moefit, or ~/.cache/moefit."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moefit"


def is_gguf(path: Path) -> bool:
    """Return whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder and rename it to `out` when the context ends without error.

    Raises:
        CheckpointError: It cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until this process ends; return False if another process holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems do not support locks; proceed there
        return True
    return True


@contextmanager
def exclusive_folder(
    folder: Path,
    *,
    busy: str,
    lock: str = ".lock",
    elsewhere: str = "set XDG_CACHE_HOME to a writable folder",
) -> Iterator[None]:
    """Create a folder and hold its lock for the duration of the context.

    Args:
        folder: Created with its parents.
        busy: Message of the error if another process holds the lock.
        lock: Name of the lock file; different names allow different work in one folder.
        elsewhere: What to do if the folder cannot be written, for the error.

    Raises:
        ConfigError: Another process holds the lock.
        CheckpointError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / lock).open("ab")
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder}: {error.strerror or error}; {elsewhere}"
        ) from error
    with file:
        if not try_lock(file.fileno()):
            raise ConfigError(busy)
        yield
