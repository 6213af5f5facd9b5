"""Figures of the operating system: memory and processors, of the machine and its control groups.

Reads /proc, /sys/fs/cgroup and /sys/devices: resident set and peak, free memory, physical cores,
and the limits of control groups (versions 1 and 2), with which containers, systemd and Slurm bound
memory and processor time. Also which addresses are this machine's own.
"""

import ipaddress
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page for "no limit"
# The keys of memory.stat for page cache that the kernel drops before it kills anything. Files of
# tmpfs are not included: the kernel counts those as anonymous pages.
_CACHE = (
    ("total_inactive_file", "total_active_file"),  # version 1, the group with those below it
    ("inactive_file", "active_file"),  # version 2
)


def process_bytes() -> int:
    """Return the resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def shared_process_bytes() -> int:
    """Return the part of the resident set that are pages of files or shared memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[2])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_process_bytes() -> int:
    """Return the largest resident set of this process so far (VmHWM).

    Raises:
        OSError: The system has no /proc, or its status lacks VmHWM.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """A memory limit of one control group that this process is in.

    Args:
        nbytes: The limit.
        used: Bytes used by the group's processes, without reclaimable page cache.
        file: The file that sets the limit.
    """

    nbytes: int
    used: int
    file: Path

    @property
    def free(self) -> int:
        """Bytes that the group's processes may still allocate."""
        return max(0, self.nbytes - self.used)


def group_limits(root: Path = ROOT) -> list[GroupLimit]:
    """Return the memory limits of this process's control group and of every group above it.

    Args:
        root: Root of the file system; tests pass a folder.

    Returns:
        Limits, the group's own first; empty if there are none.
    """
    found: list[GroupLimit] = []
    for folder in _group_folders(root):
        used = _used(folder)
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < _UNLIMITED:
                found.append(GroupLimit(limit, used, folder / name))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """What processors this process may use.

    Args:
        logical: Logical processors that the scheduler may run it on (taskset, cpusets).
        cores: Physical cores that these are part of; hyper-threads share one.
        quota: Processors' worth of time that control groups allow it; None without a limit.
        file: The file that sets the quota.
    """

    logical: int
    cores: int
    quota: float | None = None
    file: Path | None = None

    @property
    def threads(self) -> int:
        """How many threads compute fastest: one a core, and no more than the quota can run."""
        return self.cores if self.quota is None else min(self.cores, max(1, math.ceil(self.quota)))

    def describe(self, threads: int) -> str:
        """Return in words why this process computes with that many threads.

        >>> Processors(logical=8, cores=4).describe(4)
        '4 threads (4 cores)'
        >>> Processors(logical=8, cores=8, quota=0.5, file=Path("/sys/cpu.max")).describe(1)
        '1 thread (/sys/cpu.max allows 0.5 processors)'
        >>> print(Processors(logical=2, cores=2).describe(64))
        64 threads, more than the 2 that this process can run at once: unset OMP_NUM_THREADS
        """
        count = f"{threads} thread{'s' * (threads != 1)}"
        most = min(self.logical, math.ceil(self.quota or self.logical))
        if threads > most:
            return (
                f"{count}, more than the {most} that this process can run at once: "
                "unset OMP_NUM_THREADS"
            )
        if threads != self.threads:
            return f"{count} (OMP_NUM_THREADS; {self.threads} by default)"
        if self.quota is not None and self.quota < self.cores:
            return f"{count} ({self.file} allows {self.quota:g} processors)"
        return f"{count} ({self.cores} core{'s' * (self.cores != 1)})"


def processors(root: Path = ROOT) -> Processors:
    """Return the processors that this process may use.

    Args:
        root: Root of the file system; tests pass a folder.
    """
    linux = sys.platform == "linux"
    allowed = os.sched_getaffinity(0) if linux else range(os.cpu_count() or 1)
    topology = root / "sys/devices/system/cpu"
    siblings = (_text(topology / f"cpu{one}/topology/thread_siblings_list") for one in allowed)
    cores = {text or str(one) for one, text in zip(allowed, siblings, strict=True)}
    quotas = [found for folder in _group_folders(root, "cpu") if (found := _quota(folder))]
    quota, file = min(quotas, default=(None, None))
    return Processors(logical=len(allowed), cores=len(cores), quota=quota, file=file)


def _quota(folder: Path) -> tuple[float, Path] | None:
    """Return the processors' worth of time that a group may use, and the file; None: no limit."""
    file = folder / "cpu.max"  # version 2: "max 100000", or microseconds and their period
    words = _text(file).split()
    if not words:
        file = folder / "cpu.cfs_quota_us"  # version 1; -1 for no limit
        words = [_text(file).strip(), _text(folder / "cpu.cfs_period_us").strip()]
    if len(words) != 2 or not all(map(str.isdigit, words)) or not int(words[1]):
        return None
    return int(words[0]) / int(words[1]), file


def tightest_limit(root: Path = ROOT) -> GroupLimit | None:
    """Return the smallest limit of `group_limits`; None if there are none."""
    return min(group_limits(root), key=lambda limit: limit.nbytes, default=None)


def total_bytes(root: Path = ROOT) -> int:
    """Return the largest memory that a process here could use, without swap.

    This is the machine's memory, or the tightest limit of a control group if that is smaller.
    """
    limits = [limit.nbytes for limit in group_limits(root)]
    return min([_meminfo(root)["MemTotal"], *limits])


def available_bytes(root: Path = ROOT) -> int:
    """Return the memory that this process can still allocate without swapping or being killed.

    This is the machine's available memory, or what remains below the limit of a control group if
    that is smaller. Page cache counts as available.
    """
    info = _meminfo(root)
    free = info.get("MemAvailable", info["MemFree"])  # kernels before 3.14 lack MemAvailable
    return min([free, *(limit.free for limit in group_limits(root))])


def memory_pressure(root: Path = ROOT) -> float:
    """Return the percentage of the last ten seconds in which some process waited for memory.

    The larger of the machine's figure and that of this process's control group (pressure stall
    information); 0 where the kernel has none.
    """
    own = (folder / "memory.pressure" for folder in _group_folders(root))
    files = (root / "proc/pressure/memory", next((one for one in own if one.is_file()), None))
    return max(_stalled(_text(file)) for file in files if file is not None)


def _stalled(text: str) -> float:
    """Return `avg10` of the line `some` of a pressure file."""
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind == "some":
            return float(dict(field.split("=") for field in fields)["avg10"])
    return 0.0


def swap_bytes(root: Path = ROOT) -> int:
    """Return the size of the machine's swap space."""
    return _meminfo(root).get("SwapTotal", 0)


def _meminfo(root: Path) -> dict[str, int]:
    """Return the figures of /proc/meminfo in bytes."""
    lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _group_folders(root: Path, controller: str = "memory") -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, each before its parent."""
    paths = _group_paths(root)
    for mount in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = mount.partition(" - ")
        kind, _, options = after.partition(" ")
        fields = before.split()
        if kind == "cgroup" and controller in options.split()[-1].split(","):
            path = paths.get(controller)
        elif kind == "cgroup2":
            path = paths.get("")
        else:
            continue
        if path is not None:
            yield from _with_parents(root / fields[4].lstrip("/"), path, mounted=fields[3])


def _group_paths(root: Path) -> dict[str, str]:
    """Return this process's group by controller; the name of version 2 is ''."""
    found: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _with_parents(mount: Path, path: str, *, mounted: str) -> Iterator[Path]:
    """Yield a group's folder and its parents, up to the mount point of the hierarchy.

    Args:
        mount: The mount point.
        path: The group. In a container it may be relative to the host's root or to the container's
            ("/", "/../x").
        mounted: The group at the mount point; in a container often the container's own.
    """
    inside = path.removeprefix(mounted) if mounted != "/" else path
    steps = [step for step in inside.split("/") if step not in ("", "..")]
    for depth in range(len(steps), -1, -1):
        folder = mount.joinpath(*steps[:depth])
        if folder.is_dir():
            yield folder


def _used(folder: Path) -> int:
    """Return the bytes that a group uses, without page cache."""
    held = _number(folder / "memory.current")
    held = _number(folder / "memory.usage_in_bytes") if held is None else held
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    stat = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    cache = next((keys for keys in _CACHE if keys[0] in stat), ())
    return max(0, (held or 0) - sum(stat.get(key, 0) for key in cache))


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or it contains `max`."""
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(file: Path) -> str:
    """Return a file's text; empty if it does not exist or cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def is_loopback(host: str) -> bool:
    """Return whether `host` is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
