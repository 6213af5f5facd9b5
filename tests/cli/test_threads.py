"""Numbers of threads: by cores, affinity and quotas of control groups, and more than can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from levels import compiled

from moefit import host
from moefit.host import Processors, processors

V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(
    root: Path, monkeypatch, *, siblings: list[str], mounts: str = V2, **groups: str
) -> Processors:
    """Return what is found on a machine that consists of files, one sibling list a processor."""
    files = {"proc/self/mountinfo": mounts, "proc/self/cgroup": "4:cpu,cpuacct:/a/b\n0::/a/b\n"}
    files |= {f"sys/fs/cgroup/{name}": text for name, text in groups.items()}
    for number, text in enumerate(siblings):
        files[f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"] = text
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(len(siblings))))
    return processors(root)


def test_hyper_threads_share_a_core(tmp_path, monkeypatch) -> None:
    found = machine(tmp_path, monkeypatch, siblings=["0,2\n", "1,3\n", "0,2\n", "1,3\n"])
    assert (found.logical, found.cores, found.quota, found.threads) == (4, 2, None, 2)
    assert found.describe(2) == "2 threads (2 cores)"
    assert found.describe(4) == "4 threads (OMP_NUM_THREADS; 2 by default)"
    assert "5 threads, more than the 4 that this process can run at once" in found.describe(5)


def test_processors_without_topology_are_cores(tmp_path, monkeypatch) -> None:
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 7, 8})
    assert processors(tmp_path) == Processors(logical=3, cores=3)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("9000000 100000", 4),
        ("max 100000", 4),
        ("", 4),
    ],
)
def test_quota_of_version_2(tmp_path, monkeypatch, quota, threads) -> None:
    every = ["0\n", "1\n", "2\n", "3\n"]
    found = machine(tmp_path, monkeypatch, siblings=every, **{"a__b__cpu.max": f"{quota}\n"})
    assert found.threads == threads
    if threads < 4:
        allowed = int(quota.split()[0]) / 100_000
        assert f"cpu.max allows {allowed:g} processors)" in found.describe(threads)


def test_tightest_group_of_version_1_counts(tmp_path, monkeypatch) -> None:
    """A group of half a core inside one of three, beside one without a limit."""
    groups = {
        "cpu,cpuacct__cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct__cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct__a__cpu.cfs_quota_us": "25000\n",
        "cpu,cpuacct__a__cpu.cfs_period_us": "50000\n",
        "cpu,cpuacct__a__b__cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct__a__b__cpu.cfs_period_us": "100000\n",
    }
    found = machine(tmp_path, monkeypatch, siblings=["0\n", "1\n"], mounts=V1, **groups)
    assert (found.quota, found.threads) == (0.5, 1)
    assert found.file == tmp_path / "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us"
    assert "2 threads, more than the 1 that" in found.describe(2)


def test_this_machine() -> None:
    found = processors()
    assert 1 <= found.threads <= found.cores <= found.logical
    assert found.logical == len(os.sched_getaffinity(0))


STARTED = """
import os, sys
import moefit.cli.app
from moefit.host import Processors

app = sys.modules["moefit.cli.app"]
app.processors = lambda: Processors(logical=8, cores=8, quota=2.5)
sys.argv = ["moefit", "--version"]
try: app.main()
except SystemExit: pass
print(os.environ["OMP_NUM_THREADS"], os.environ.get("MKL_DYNAMIC"))
"""


@pytest.mark.parametrize(
    ("given", "used"), [(None, ["3", "None"]), ("", ["3", "None"]), ("5", ["5", "FALSE"])]
)
def test_the_command_line_sets_the_number_unless_it_is_given(given, used) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    run = subprocess.run(
        [sys.executable, "-c", STARTED], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-2:] == used


MORE_THAN_CORES = """
import torch
from moefit.host import processors
from moefit.quant.cpu_kernels import kernels

run, weight_OI, x_TI = kernels(), torch.randn(3000, 128), torch.randn(3, 128)
many = torch.get_num_threads()
y_TO = run.linear(x_TI, weight_OI)
torch.set_num_threads(1)
assert torch.equal(run.linear(x_TI, weight_OI), y_TO)
print(processors().describe(many))
"""


@compiled
def test_more_threads_than_cores_compute_the_same_bits_and_are_named() -> None:
    many = len(os.sched_getaffinity(0)) + 6
    environment = {**os.environ, "OMP_NUM_THREADS": str(many), "MKL_DYNAMIC": "FALSE"}
    run = subprocess.run(
        [sys.executable, "-c", MORE_THAN_CORES], env=environment, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"{many} threads, more than the" in run.stdout


def test_real_quota_is_detected() -> None:
    """Needs root and a writable hierarchy of version 1 or 2."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    parent, file, text = (
        (v1, "cpu.cfs_quota_us", "50000") if v1.is_dir() else (v2, "cpu.max", "50000 100000")
    )
    group = parent / f"moefit_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no group for processors can be made here")
    try:
        try:
            (group / file).write_text(text)
        except OSError:
            pytest.skip("the processor time of groups cannot be limited here")
        inside = (
            "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from moefit.host import processors; print(processors().quota, processors().threads)"
        )
        done = subprocess.run(
            [sys.executable, "-c", inside, str(group)],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.split() == ["0.5", "1"]
    finally:
        group.rmdir()


def test_files_are_read_below_the_given_root_alone(tmp_path) -> None:
    assert host.processors(tmp_path).quota is None
