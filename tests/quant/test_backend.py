"""Kernels by device, messages about them, and the optional dependency on Triton."""

import subprocess
import sys

import pytest
import torch

from moefit.errors import ConfigError
from moefit.quant import backend as module
from moefit.quant import cpu_kernels as compiled
from moefit.quant.backend import backend, backend_status
from moefit.quant.cpu_kernels import kernels, status
from moefit.quant.library import SWITCH

CPU, GPU, OTHER = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Unset the variables, and clear caches before and after."""
    monkeypatch.delenv(SWITCH, raising=False)
    for clear in (compiled.kernels.cache_clear, module._triton.cache_clear):
        clear()
    yield
    monkeypatch.undo()
    for clear in (compiled.kernels.cache_clear, module._triton.cache_clear):
        clear()


def test_cpu_uses_compiled_kernels() -> None:
    assert backend(CPU) is kernels() and backend_status(CPU) == status()


def test_gpu_uses_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (its wheel has 290 MB)")
    from moefit.quant.gpu.gpu_kernels import TritonKernels

    assert isinstance(backend(GPU), TritonKernels) and backend_status(GPU) == "triton"


def test_gpu_without_triton_uses_torch_and_warns(monkeypatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert backend(GPU) is None
    assert backend_status(GPU) == "torch: Triton is not installed"


def test_environment_variable_disables_kernels(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "torch")
    assert backend(CPU) is backend(GPU) is None
    assert backend_status(GPU) == f"torch: {SWITCH}=torch"


def test_unknown_level_raises_on_gpu(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "tritno")
    with pytest.raises(ConfigError, match="'tritno' is none of"):
        backend(GPU)


def test_other_devices_use_torch() -> None:
    assert backend(OTHER) is None and backend_status(OTHER) == "torch: no kernels for mps"


def test_triton_is_imported_only_for_gpus() -> None:
    """CPU builds of torch do not include it."""
    code = (
        "import sys, moefit.serve.layer.executor, moefit.serve.hf.quant_linear\n"
        "ours = ('moefit.quant.triton', 'moefit.quant.gpu')\n"
        "assert not [name for name in sys.modules if name.startswith(ours)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
