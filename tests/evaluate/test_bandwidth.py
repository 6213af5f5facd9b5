"""Bandwidths of storage and memory, measured without taking memory from the caller."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moefit.errors import ConfigError
from moefit.evaluate import bandwidth
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.host import peak_process_bytes, process_bytes

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(4 * MIB)}, tmp_path / "model.safetensors")
    return tmp_path


def test_it_takes_nothing_from_this_process(folder: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_bytes()
    found = measure_bandwidth(folder, threads=1)
    assert found.storage > 0 and found.memory > 0
    assert peak_process_bytes() - before < 64 * MIB


def test_the_measuring_process_imports_no_torch() -> None:
    code = (
        "import moefit.evaluate.bandwidth, sys; from moefit.host import process_bytes\n"
        "print(*[n for n in ('torch', 'transformers', 'typer', 'numpy') if n in sys.modules])\n"
        "print(process_bytes())"
    )
    command = [sys.executable, "-c", code]
    names, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert names == "numpy"
    assert int(size) < 80 * MIB


def test_a_measurement_that_fails_is_an_error_that_says_how(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(bandwidth, "sys", type("sys", (), {"executable": "/bin/false"}))
    with pytest.raises(ConfigError, match="exit code 1: no message"):
        measure_bandwidth(folder, threads=1)


def test_measurement_uses_at_most_half_of_free_memory(monkeypatch) -> None:
    monkeypatch.setattr(bandwidth, "_cache_bytes", lambda folder: 1 << 40)
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 20 * MIB)
    assert bandwidth._timed_bytes() == 10 * MIB
    assert bandwidth._memory_bandwidth() > 0
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 0)
    assert bandwidth._memory_bandwidth() > 0
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 1 << 40)
    assert bandwidth._timed_bytes() == 4096 * MIB


def test_shared_caches_count_once(tmp_path: Path, monkeypatch) -> None:
    """Four processors in two parts of 400 MiB, as servers have that hold a matrix of 384 MiB."""
    for cpu in range(4):
        shared = "0-1" if cpu < 2 else "2-3"
        for index, (level, size) in enumerate((("1", "32K"), ("3", "409600K"))):
            part = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            part.mkdir(parents=True)
            files = {"level": level, "size": size, "shared_cpu_list": shared if index else str(cpu)}
            for name, value in files.items():
                (part / name).write_text(value + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert bandwidth._cache_bytes(tmp_path) == 800 * MIB
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1})
    assert bandwidth._cache_bytes(tmp_path) == 400 * MIB
    assert bandwidth._cache_bytes(tmp_path / "nothing") == 0
