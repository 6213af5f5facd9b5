"""What the operating system says about memory: of this process, of the machine, of its cgroups.

Owns every reading of /proc and /sys/fs/cgroup: resident set and peak, free memory, and the limits
of control groups (versions 1 and 2), by which containers, systemd and Slurm bound memory. Knows
nothing of models, budgets or torch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page for "no limit"
# The keys of memory.stat for page cache that the kernel drops before it kills anything. Files of
# tmpfs are not among them: the kernel counts those as anonymous pages.
_CACHE = (
    ("total_inactive_file", "total_active_file"),  # version 1, the group with those below it
    ("inactive_file", "active_file"),  # version 2
)


def process_bytes() -> int:
    """Return the resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
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
        used: What the group's processes hold of it, without page cache, which gives way.
        file: The file that sets the limit.
    """

    nbytes: int
    used: int
    file: Path

    @property
    def free(self) -> int:
        """What the group's processes may still take."""
        return max(0, self.nbytes - self.used)


def group_limits(root: Path = ROOT) -> list[GroupLimit]:
    """Return the memory limits of this process's control group and of every group above it.

    Args:
        root: Where the file system begins; tests give a folder of their own.

    Returns:
        A list of limits, the group's own first; empty where nothing limits it.
    """
    found: list[GroupLimit] = []
    for folder in _group_folders(root):
        used = _used(folder)
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < _UNLIMITED:
                found.append(GroupLimit(limit, used, folder / name))
    return found


def tightest_limit(root: Path = ROOT) -> GroupLimit | None:
    """Return the smallest limit of `group_limits`; None where nothing limits this process."""
    return min(group_limits(root), key=lambda limit: limit.nbytes, default=None)


def total_bytes(root: Path = ROOT) -> int:
    """Return the memory that processes here could have at most, without swap.

    It is the machine's memory, or the tightest limit of a control group if that is less.
    """
    limits = [limit.nbytes for limit in group_limits(root)]
    return min([_meminfo(root)["MemTotal"], *limits])


def available_bytes(root: Path = ROOT) -> int:
    """Return the memory that this process could still take without swapping or being killed.

    It is what the machine has available, or what is left below the limit of a control group if
    that is less. Page cache counts as available.
    """
    info = _meminfo(root)
    free = info.get("MemAvailable", info["MemFree"])  # kernels before 3.14 have no estimate
    return min([free, *(limit.free for limit in group_limits(root))])


def swap_bytes(root: Path = ROOT) -> int:
    """Return the size of the machine's swap space."""
    return _meminfo(root).get("SwapTotal", 0)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many processors' time control groups allow this process; None if all of it."""
    shares: list[float] = []
    for folder in _group_folders(root, "cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            shares.append(int(words[0]) / int(words[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            shares.append(quota / period)
    return min(shares, default=None)


def _meminfo(root: Path) -> dict[str, int]:
    """Figures of /proc/meminfo in bytes."""
    lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _group_folders(root: Path, controller: str = "memory") -> Iterator[Path]:
    """The folders of this process's groups that a controller may limit, each before its parent."""
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
    """This process's group by controller, from /proc/self/cgroup; version 2 has the name ''."""
    found: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _with_parents(mount: Path, path: str, *, mounted: str) -> Iterator[Path]:
    """A group's folder and those above it, up to where the hierarchy is mounted.

    mounted: the group that is seen at the mount point. In a container it is often the container's
    own, while `path` is told from the host's root or from the container's ("/", "/../x").
    """
    inside = path.removeprefix(mounted) if mounted != "/" else path
    steps = [step for step in inside.split("/") if step not in ("", "..")]
    for depth in range(len(steps), -1, -1):
        folder = mount.joinpath(*steps[:depth])
        if folder.is_dir():
            yield folder


def _used(folder: Path) -> int:
    """What a group holds, without page cache."""
    held = _number(folder / "memory.current")
    held = _number(folder / "memory.usage_in_bytes") if held is None else held
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    stat = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    cache = next((keys for keys in _CACHE if keys[0] in stat), ())
    return max(0, (held or 0) - sum(stat.get(key, 0) for key in cache))


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says `max`."""
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(file: Path) -> str:
    """A file's text; nothing where the system has no such file, or does not let it be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
