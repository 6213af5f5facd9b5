"""Memory figures of the operating system, also inside containers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefit import host
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.memory.budget import BlockNeeds, MemoryBudget
from moefit.serve.memory.held import check_system_memory

GIB = 1 << 30
MEMINFO = (
    "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   33554432 kB\n"
    "HugePages_Total:       0\nSwapTotal:       2097152 kB\n"
)
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def system(folder: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    """Write a folder that looks like the root of a file system."""
    every = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": mounts, "proc/self/cgroup": groups}
    for name, text in (every | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_no_limits_use_machine_memory(tmp_path: Path) -> None:
    root = system(tmp_path, V2.format(root="/"), "0::/user.slice\n", {})
    assert host.tightest_limit(root) is None
    assert host.available_bytes(root) == 32 * GIB
    assert host.total_bytes(root) == 64 * GIB
    assert host.swap_bytes(root) == 2 * GIB


def test_cgroup_v2_container_root(tmp_path: Path) -> None:
    """Docker's default: a cgroup namespace, in which the container's group is `/`."""
    files = {
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.high": "max\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {2 * GIB}\ninactive_file {GIB}\n"
        f"active_file {GIB // 2}\n",
    }
    root = system(tmp_path, V2.format(root="/"), "0::/\n", files)
    limit = host.tightest_limit(root)
    assert limit is not None
    assert (limit.nbytes, limit.used) == (4 * GIB, 3 * GIB // 2)
    assert host.available_bytes(root) == 5 * GIB // 2, "page cache gives way"
    assert host.total_bytes(root) == 4 * GIB


def test_tightest_nested_limit_applies(tmp_path: Path) -> None:
    groups = "sys/fs/cgroup/system.slice"
    files = {
        f"{groups}/memory.max": f"{2 * GIB}\n",
        f"{groups}/memory.current": f"{GIB}\n",
        f"{groups}/a.service/memory.max": f"{3 * GIB}\n",
        f"{groups}/a.service/memory.current": f"{GIB // 2}\n",
        f"{groups}/a.service/memory.high": f"{5 * GIB // 2}\n",
    }
    root = system(tmp_path, V2.format(root="/"), "0::/system.slice/a.service\n", files)
    assert [one.nbytes for one in host.group_limits(root)] == [3 * GIB, 5 * GIB // 2, 2 * GIB]
    assert host.available_bytes(root) == GIB


@pytest.mark.parametrize(
    ("mounted", "path"),
    [("/", "/docker/abc"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/docker/abc/inner")],
)
def test_cgroup_v1_with_and_without_namespace(tmp_path: Path, mounted: str, path: str) -> None:
    inside = path if mounted == "/" else path.removeprefix(mounted)
    memory = f"sys/fs/cgroup/memory{inside}"
    files = {
        f"{memory}/memory.limit_in_bytes": f"{GIB}\n",
        f"{memory}/memory.usage_in_bytes": f"{GIB // 2}\n",
        f"{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n"
        "total_active_file 0\n",
    }
    if inside:
        files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    groups = f"4:memory:{path}\n1:cpu:{path}\n0::/\n"
    root = system(tmp_path, V1.format(root=mounted), groups, files)
    assert [one.nbytes for one in host.group_limits(root)] == [GIB]
    assert host.available_bytes(root) == 3 * GIB // 4


def test_foreign_group_path_falls_back_to_mount(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": "0\n"}
    root = system(tmp_path, V2.format(root="/"), "0::/../../elsewhere\n", files)
    assert [one.nbytes for one in host.group_limits(root)] == [GIB]


def test_system_without_cgroups(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\nMemFree: 512 kB\n")
    assert host.group_limits(tmp_path) == []
    assert (host.available_bytes(tmp_path), host.swap_bytes(tmp_path)) == (512 << 10, 0)


def test_this_machine() -> None:
    assert 0 < host.available_bytes() <= host.total_bytes()
    assert 0 < host.process_bytes() <= host.peak_process_bytes()


IN_A_GROUP = """
import os, sys
with open(os.path.join(sys.argv[1], "cgroup.procs"), "w") as file:
    file.write(str(os.getpid()))
from moefit import host
print(host.total_bytes(), host.available_bytes())
"""


def test_real_cgroup_is_detected() -> None:
    """Needs root and a writable cgroup file system."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, file = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = parent / f"moefit_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no memory group can be made here")
    try:
        try:
            (group / file).write_text(str(GIB))
        except OSError:
            pytest.skip("the memory of groups cannot be limited here")
        done = subprocess.run(
            [sys.executable, "-c", IN_A_GROUP, str(group)],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        total, available = map(int, done.stdout.split())
        assert total == GIB
        assert GIB // 2 < available < GIB
    finally:
        group.rmdir()


def ledger(total: int | None) -> MemoryBudget:
    """Two blocks of four experts of 1 GiB, and 2 GiB: a minimum of 4, and 10 for all."""
    blocks = tuple(
        BlockNeeds(name=name, num_experts=4, slot_bytes=GIB, min_slots=1) for name in ("a", "b")
    )
    return MemoryBudget(
        total=total, process=GIB, weights=GIB, kv_cache=0, workspace=0, staging=0, blocks=blocks
    )


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch):
    """Simulate these figures of the system."""

    def limit(most: int, free: int, swap: int = 0) -> None:
        one = host.GroupLimit(most, most - free, Path("/sys/fs/cgroup/memory.max"))
        for name, value in (("tightest_limit", one), ("total_bytes", most),
                            ("available_bytes", free), ("swap_bytes", swap),
                            ("process_bytes", 0)):  # fmt: skip
            monkeypatch.setattr(f"moefit.serve.memory.held.{name}", lambda value=value: value)

    return limit


CPU = torch.device("cpu")


def test_budget_above_limit_raises(limited) -> None:
    limited(6 * GIB, 5 * GIB)
    with pytest.raises(ConfigError, match=rf"8.00 GiB.*memory.max.*6.00 GiB.*{5 * GIB} bytes"):
        check_system_memory(ledger(8 * GIB), CPU)
    with pytest.raises(ConfigError, match="without a budget"):
        check_system_memory(ledger(None), CPU)
    check_system_memory(ledger(None), torch.device("cuda"))


def test_model_above_limit_raises(limited) -> None:
    limited(3 * GIB, 3 * GIB)
    with pytest.raises(BudgetTooSmallError, match=rf"3.00 GiB.*4.00 GiB.*{4 * GIB}"):
        check_system_memory(ledger(5 * GIB), CPU)


@pytest.mark.parametrize(
    ("total", "most", "free", "swap"),
    [(6, 8, 5, 0), (8, 6, 5, 4)],
    ids=["others hold some", "it may swap"],
)
def test_possible_overcommit_warns(
    limited, caplog, total: int, most: int, free: int, swap: int
) -> None:
    limited(most * GIB, free * GIB, swap * GIB)
    check_system_memory(ledger(total * GIB), CPU)
    assert "may be killed" in caplog.text


def test_budget_above_free_memory_warns(limited, caplog) -> None:
    limited(16 * GIB, 16 * GIB)
    check_system_memory(ledger(64 * GIB), CPU)
    assert "the budget of 64.0 GiB is more than the limit" in caplog.text
    assert "at most 10.0 GiB of it" in caplog.text and "killed" not in caplog.text
    caplog.clear()
    check_system_memory(ledger(12 * GIB), CPU)
    assert not caplog.text


def test_fitting_budget_does_not_warn(limited, caplog) -> None:
    limited(12 * GIB, 11 * GIB)
    check_system_memory(ledger(6 * GIB), CPU)
    check_system_memory(ledger(None), CPU)
    assert not caplog.text


def test_pressure_is_the_larger_of_machine_and_group(tmp_path: Path) -> None:
    line = "some avg10={:.2f} avg60=0.38 avg300=0.57 total=10\nfull avg10=9.00 avg60=0 total=1\n"
    files = {"proc/pressure/memory": line.format(0.5)}
    root = system(tmp_path, V2.format(root="/"), "0::/job\n", files)
    assert host.memory_pressure(root) == 0.5
    (root / "sys/fs/cgroup/job").mkdir(parents=True)
    (root / "sys/fs/cgroup/job/memory.pressure").write_text(line.format(2.25))
    assert host.memory_pressure(root) == 2.25
    assert host.memory_pressure(tmp_path / "elsewhere") == 0.0
