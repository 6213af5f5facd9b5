"""Read files past the page cache (O_DIRECT), so that bytes are copied once and evict nothing.

In a control group, a page of the cache counts as memory of the group: at its limit, each read of
an expert would first have to reclaim as many pages. The system requires that offsets, sizes and
addresses are multiples of the storage's block size; spans of other alignment pass through a buffer.
"""

import errno
import mmap
import os
import threading

import numpy as np

ALIGNMENT = 4096  # bytes; no storage in use has larger blocks
LEAST = 64 << 10  # bytes; with fewer, the page cache is as fast
BOUNCE = 1 << 20  # bytes of the buffer of each thread that reads spans of other alignment
# Of file systems without direct reads, and of storage with larger blocks.
_IMPOSSIBLE = (errno.EINVAL, errno.EOPNOTSUPP)
_MAX_READ = 1 << 30  # bytes per call; Linux reads at most 2 GiB minus a page

_of_thread = threading.local()


class DirectFile:
    """A file for direct reads, opened by the first of them. Thread-safe.

    Args:
        open_file: Descriptor of the same file, whose name may belong to another one by now.
    """

    def __init__(self, open_file: int):
        self._name = f"/proc/self/fd/{open_file}"
        self._descriptor: int | None = None
        self._usable = hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor, self._usable = None, False

    def read(self, offset: int, buffer: memoryview) -> int:
        """Read as much as can be read directly, from the beginning of the buffer on.

        Args:
            offset: Where to begin, in bytes.
            buffer: The destination.

        Returns:
            The number of bytes read: 0 for small reads and where direct reads fail, which other
            reads then report or repair.
        """
        if len(buffer) < LEAST:
            return 0
        try:
            if (file := self._opened()) is None:
                return 0
            if offset % ALIGNMENT == 0 and _address(buffer) % ALIGNMENT == 0:
                return _straight(file, offset, buffer[: len(buffer) // ALIGNMENT * ALIGNMENT])
            return _by_bounce(file, offset, buffer)
        except OSError as error:
            if error.errno in _IMPOSSIBLE:
                self._usable = False
            return 0

    def _opened(self) -> int | None:
        """Return the descriptor; None once direct reads are over."""
        with self._lock:  # a closed file's number may belong to another file
            if not self._usable:
                return None
            if self._descriptor is None:
                self._descriptor = os.open(self._name, os.O_RDONLY | os.O_DIRECT)
            return self._descriptor


def _straight(file: int, offset: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done : done + _MAX_READ]], offset + done)
        done += count
        if count % ALIGNMENT or not count:
            break  # the end of the file
    return done


def _by_bounce(file: int, offset: int, buffer: memoryview) -> int:
    bounce, done = _bounce(), 0
    while done < len(buffer):
        skip = (offset + done) % ALIGNMENT
        size = min(BOUNCE, -(-(skip + len(buffer) - done) // ALIGNMENT) * ALIGNMENT)
        count = os.preadv(file, [bounce[:size]], offset + done - skip)
        part = min(count - skip, len(buffer) - done)
        if part <= 0:
            break  # the end of the file
        buffer[done : done + part] = bounce[skip : skip + part]
        done += part
        if count < size:
            break
    return done


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _bounce() -> memoryview:
    """Return this thread's buffer, which is aligned to pages."""
    found: memoryview | None = getattr(_of_thread, "bounce", None)
    if found is None:
        found = _of_thread.bounce = memoryview(mmap.mmap(-1, BOUNCE))
    return found
