"""Fixtures that several tests of serving share."""

from collections.abc import Iterator

import pytest
from levels import HERE, at_level

from moefit.quant import cpu_kernels


@pytest.fixture(params=[*map(at_level, ("portable", "avx2")), "best", "torch"])
def computing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with kernels of two levels, the best level or torch; tests/quant tests the others."""
    best = HERE[-1] if HERE else "torch"
    if request.param == "best" and best in ("portable", "avx2", "torch"):
        pytest.skip("it is one of the others")
    monkeypatch.setenv(cpu_kernels.SWITCH, best if request.param == "best" else request.param)
    cpu_kernels.kernels.cache_clear()
    yield
    cpu_kernels.kernels.cache_clear()
