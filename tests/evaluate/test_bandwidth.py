"""The machine's two ceilings, measured without taking memory from who asks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moefit.evaluate import speed
from moefit.evaluate.speed import bandwidth_apart, measure_bandwidth
from moefit.host import peak_process_bytes, process_bytes

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(4 * MIB)}, tmp_path / "model.safetensors")
    return tmp_path


def grown(measure, folder: Path) -> int:
    """How far the peak of this process gets above what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_bytes()
    found = measure(folder)
    assert found.storage > 0
    assert found.memory > 0
    return peak_process_bytes() - before


def test_measured_apart_it_takes_nothing_from_this_process(folder: Path) -> None:
    assert grown(measure_bandwidth, folder) > 300 * MIB, "else the next line shows nothing"
    assert grown(bandwidth_apart, folder) < 64 * MIB


def test_no_more_memory_is_taken_than_half_of_what_is_free(monkeypatch) -> None:
    monkeypatch.setattr(speed, "_cache_bytes", lambda folder: 1 << 40)
    monkeypatch.setattr(speed, "available_bytes", lambda: 200 * MIB)
    assert speed._timed_bytes() == 100 * MIB
    monkeypatch.setattr(speed, "available_bytes", lambda: 0)
    assert speed._timed_bytes() == 16 * MIB
    monkeypatch.setattr(speed, "available_bytes", lambda: 1 << 40)
    assert speed._timed_bytes() == 4096 * MIB


def test_caches_count_once_for_all_that_share_them(tmp_path: Path, monkeypatch) -> None:
    """Four processors in two parts of 400 MiB, as servers have that hold a matrix of 384 MiB."""
    for cpu in range(4):
        shared = "0-1" if cpu < 2 else "2-3"
        for index, (level, size) in enumerate((("1", "32K"), ("3", "409600K"))):
            part = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            part.mkdir(parents=True)
            told = {"level": level, "size": size, "shared_cpu_list": shared if index else str(cpu)}
            for name, value in told.items():
                (part / name).write_text(value + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert speed._cache_bytes(tmp_path) == 800 * MIB
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1})
    assert speed._cache_bytes(tmp_path) == 400 * MIB
    assert speed._cache_bytes(tmp_path / "nothing") == 0
