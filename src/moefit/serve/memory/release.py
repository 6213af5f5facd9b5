"""Give memory back to the system: freed blocks of the heap, and pages of libraries not in use.

Importing torch and transformers reads more than 100 MiB of their code that serving never runs
again. These pages are copies of files, which the system reads anew when they are needed. Only those
of libraries are dropped, since nothing unmaps them and puts other memory at their addresses.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from moefit.host import shared_process_bytes

# What serving uses again after everything was dropped. Measured on generating, sampling, beams and
# an engine's requests, one after the other: 37 to 58 MiB, and up to 73 on Linux 6.18, whose ext4
# keeps files in larger pieces that are mapped as a whole.
LIBRARY_PAGES = 80 << 20
_STEP = 2 << 20  # changes of the process below this do not count
_DONTNEED = 4  # MADV_DONTNEED of Linux
_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)\s*(.*)")
_LIBRARY = re.compile(r"\.so($|[. ])|/python[0-9.]*$")


@dataclass(frozen=True, slots=True)
class FileMapping:
    """A mapped part of a file whose pages are all copies of it, so that they may be dropped.

    Args:
        start: Address.
        nbytes: Its length.
        resident: Bytes of it in memory.
    """

    start: int
    nbytes: int
    resident: int


def droppable_mappings(smaps: Path = _SMAPS) -> Iterator[FileMapping]:
    """Yield the mappings of libraries that cannot be written to and hold no page of their own.

    Relocated data of libraries are pages of their own, although they are write-protected later.

    Args:
        smaps: In the format of Linux's /proc/PID/smaps; a missing file has none.
    """
    try:
        lines = smaps.read_text(errors="replace").splitlines()
    except OSError:
        return
    mapping: tuple[int, int] | None = None
    sizes: dict[str, int] = {}
    for line in [*lines, "0-0 ---p 0 0:0 0"]:
        if not (header := _MAPPING.match(line)):
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value.split()[0]) * 1024
            continue
        own = sizes.get("Anonymous", 1) or sizes.get("Swap", 0)
        if mapping is not None and sizes.get("Rss") and not own:
            yield FileMapping(mapping[0], mapping[1] - mapping[0], sizes["Rss"])
        start, end, permissions, inode, path = header.groups()
        is_file = inode != "0" and _LIBRARY.search(path) is not None
        is_copy = is_file and permissions[1] == "-" and permissions[3] == "p"
        mapping, sizes = (int(start, 16), int(end, 16)) if is_copy else None, {}


def droppable_bytes() -> int:
    """Return the bytes that `drop_library_pages` would give back now, to a few MiB.

    Planning asks for hundreds of estimates, and reading smaps takes a tenth of a second.
    """
    return _droppable_with(shared_process_bytes() // _STEP)


@lru_cache(maxsize=8)
def _droppable_with(_shared: int) -> int:
    """Return the same for a process with this many steps of pages of files."""
    return sum(one.resident for one in droppable_mappings())


def drop_library_pages() -> int:
    """Drop the resident pages of mapped files, and return their bytes.

    They return one by one as they are used. Does nothing where the system is not Linux, and where
    few are resident, since finding them takes a tenth of a second.
    """
    if (advise := _madvise()) is None or shared_process_bytes() < LIBRARY_PAGES // 2:
        return 0
    dropped = 0
    for one in droppable_mappings():
        if advise(one.start, one.nbytes, _DONTNEED) == 0:
            dropped += one.resident
    return dropped


def return_freed_memory() -> None:
    """Return freed memory of the C heap and of torch's GPU cache to the system.

    Slots are mappings and return at once, but the heap retains other freed blocks of a few MiB,
    such as weights after they were encoded.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def _madvise():
    """Return the C library's madvise; None where it is missing."""
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        function.restype = ctypes.c_int
        return function
    return None
