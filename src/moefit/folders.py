"""Folders that several processes may come to: where the cache is, and having one for oneself."""

import os
from pathlib import Path

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
