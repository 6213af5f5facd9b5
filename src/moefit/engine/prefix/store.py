"""Files of keys and values, so that prefixes survive a restart.

A text is divided into chunks, and each chunk with its keys and values is one file, named by a hash
of the model's fingerprint, the namespace and all tokens up to its end. Files are written beside
their place and renamed, and carry a checksum: a file that was damaged, or is of something else, is
removed or left alone with a line in the log. The least recently used files of all models make room
for new ones. One server at a time uses a folder. No tensors or threads.
"""

import hashlib
import logging
import os
import re
import stat
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time_ns

from moefit.engine.prefix.tree import Prefix
from moefit.errors import CheckpointError
from moefit.folders import exclusive_folder

_LOG = logging.getLogger(__name__)
_SUFFIX, _PARTIAL = ".kv", ".partial"
_HEAD = struct.Struct("<8s32s32sQ")  # kind, key, checksum and size of the content
_KIND = b"moefit.1"
_KEY, _FINGERPRINT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
# a link or a FIFO in the place of a file must lead nowhere and not block; 0 where there are none
_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStats:
    """What the files hold, and totals since the start.

    Attributes:
        files: Number of files.
        bytes: Their size.
        limit: Largest size.
        read: Tokens whose keys and values were read.
        written: Tokens whose keys and values were written.
        damaged: Files that were not used because their content was wrong.
    """

    files: int
    bytes: int
    limit: int
    read: int = 0
    written: int = 0
    damaged: int = 0


class PrefixStore:
    """Files of one model in a folder that several models may use in turn.

    Args:
        folder: Created if there is none, for the owner only; one that exists keeps its permissions.
        limit: Bytes of all files at most.
        fingerprint: Hexadecimal; identifies model, precision, tokenizer and layout of the cache.

    Raises:
        CheckpointError: The folder cannot be used.
        ConfigError: Another server uses it.
    """

    def __init__(self, folder: Path, limit: int, fingerprint: str):
        self._limit, self._fingerprint = limit, fingerprint
        self._closing, new = ExitStack(), not folder.exists()
        busy = f"{folder} is used by another server; give each a --prefix-cache-dir of its own"
        self._closing.enter_context(
            exclusive_folder(folder, busy=busy, elsewhere="give another --prefix-cache-dir")
        )
        self._own = folder / fingerprint
        self._files: OrderedDict[Path, int] = OrderedDict()  # size, least recently used first
        self._bytes = self._damaged = 0
        self._failing = False
        try:
            if new:
                folder.chmod(0o700)  # keys and values tell what was written
            self._own.mkdir(mode=0o700, exist_ok=True)
            if self._own.is_symlink():
                raise OSError(f"{self._own.name} in it is a link to another folder")
            self._scan(folder)
        except OSError as error:
            self._closing.close()
            raise CheckpointError(
                f"{folder} cannot be used: {error.strerror or error}; give another "
                "--prefix-cache-dir"
            ) from error
        self._make_room(0)

    def keys(self, prefix: Prefix, chunk: int) -> list[str]:
        """Return the names of a text's whole chunks of `chunk` tokens, in order."""
        digest = hashlib.sha256(repr((self._fingerprint, prefix.namespace, chunk)).encode())
        names: list[str] = []
        for end in range(chunk, len(prefix.tokens) + 1, chunk):
            digest.update(array("q", prefix.tokens[end - chunk : end]).tobytes())
            names.append(digest.hexdigest())
        return names

    def known(self, keys: Iterable[str]) -> int:
        """Return how many of these chunks, from the first, have files."""
        count = 0
        for key in keys:
            if self._path(key) not in self._files:
                break
            count += 1
        return count

    def capacity(self, nbytes: int) -> int:
        """Return how many chunks of `nbytes` all files may hold."""
        return self._limit // file_size(nbytes)

    def use(self, keys: Sequence[str]) -> None:
        """Mark the chunks of a text as used, the last one first."""
        for key in reversed(keys):
            if (path := self._path(key)) in self._files:
                self._files.move_to_end(path)
                with suppress(OSError):
                    os.utime(path, ns=(time_ns(), time_ns()))

    def read(self, key: str, size: int) -> bytearray | None:
        """Return the content of a chunk.

        Args:
            key: Its name.
            size: Expected bytes.

        Returns:
            None if there is no file, or it is damaged; such a file is removed.
        """
        path = self._path(key)
        if path not in self._files:
            return None
        try:
            content, damage = _read(path, bytes.fromhex(key), size)
        except OSError as error:
            content, damage = None, error.strerror or str(error)
        if damage is not None:
            self._damaged += 1
            _LOG.warning("%s is not used: %s", path, damage)
            self._remove(path)
        return content

    def write(self, key: str, content: bytes | bytearray | memoryview) -> bool:
        """Write a chunk, removing the least recently used ones if needed.

        Returns:
            Whether it was written; errors are logged once until writing works again.
        """
        path, view = self._path(key), memoryview(content)
        size = file_size(view.nbytes)
        if size > self._limit:
            return False
        head = _HEAD.pack(_KIND, bytes.fromhex(key), hashlib.sha256(view).digest(), view.nbytes)
        partial = path.with_suffix(_PARTIAL)
        try:
            self._make_room(size)
            partial.unlink(missing_ok=True)  # perhaps a link, which would be followed
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK
            with open(os.open(partial, flags, 0o600), "wb") as file:
                file.write(head)
                file.write(view)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._failing:
                _LOG.warning("prefixes cannot be written to %s: %s", self._own, error.strerror)
            self._failing = True
            return False
        self._failing = False
        self._bytes += size - self._files.pop(path, 0)
        self._files[path] = size
        return True

    def stats(self) -> DiskStats:
        """Return what the files hold."""
        return DiskStats(
            files=len(self._files), bytes=self._bytes, limit=self._limit, damaged=self._damaged
        )

    def close(self) -> None:
        """Let other servers use the folder."""
        self._closing.close()

    def check(self) -> None:
        """Raise AssertionError if files and counts disagree."""
        assert self._bytes == sum(self._files.values()) <= self._limit
        for path, size in self._files.items():
            assert path.stat().st_size == size, path

    def _path(self, key: str) -> Path:
        return self._own / f"{key}{_SUFFIX}"

    def _scan(self, folder: Path) -> None:
        """Find the files of all models, and remove what a killed server had begun to write."""
        found: list[tuple[int, Path, int]] = []
        foreign: list[str] = []
        for path, status in _entries(folder):
            if status is None or not stat.S_ISREG(status.st_mode) or path.parent == folder:
                foreign.append(path.name)
            elif path.suffix == _PARTIAL and _KEY.fullmatch(path.stem):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            elif path.suffix == _SUFFIX and _KEY.fullmatch(path.stem):
                found.append((status.st_mtime_ns, path, status.st_size))
            else:
                foreign.append(path.name)
        if foreign:
            _LOG.warning(
                "%s has %d entries that are not of moefit, such as %s; they are left as they are",
                folder, len(foreign), sorted(foreign)[0],
            )  # fmt: skip
        for _, path, size in sorted(found):
            self._files[path] = size
            self._bytes += size

    def _make_room(self, size: int) -> None:
        while self._files and self._bytes + size > self._limit:
            self._remove(next(iter(self._files)))

    def _remove(self, path: Path) -> None:
        self._bytes -= self._files.pop(path)
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_LINK | _NO_WAIT)


def file_size(nbytes: int) -> int:
    """Return the size of the file of a chunk of `nbytes`."""
    return _HEAD.size + nbytes


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Yield all entries but folders of models, which are entered, and the lock.

    Links are not followed. The status is None for what cannot be read.
    """
    for path in folder.iterdir():
        try:
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and _FINGERPRINT.fullmatch(path.name):
                for one in list(path.iterdir()):
                    yield one, _status(one)
            elif path.name != ".lock":
                yield path, status
        except OSError:
            yield path, None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _read(path: Path, key: bytes, size: int) -> tuple[bytearray | None, str | None]:
    """Return a file's content, or what is wrong with it."""
    with open(path, "rb", buffering=0, opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None, "it is not a regular file"
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None, "it ends within its header"
        kind, named, checksum, length = _HEAD.unpack(head)
        if kind != _KIND:
            return None, "it is not of this version of moefit"
        if (named, length) != (key, size):
            return None, "it is of another text or model"
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size and (count := file.readinto(view[done:])):
            done += count
        if done < size:
            return None, f"it has {done:,} bytes of {size:,}"
    if hashlib.sha256(content).digest() != checksum:
        return None, "its content does not match its checksum"
    return content, None
