"""The machine's two ceilings, measured without taking memory from who asks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moefit.evaluate.bandwidth import bandwidth_apart, measure_bandwidth
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
