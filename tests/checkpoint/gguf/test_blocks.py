"""Values of blocks equal the `gguf` package's bit for bit; scales must be finite."""

import numpy as np
import pytest
import torch

from moefit.checkpoint.gguf import blocks
from moefit.checkpoint.gguf.blocks import OWN, decode_blocks, require_package
from moefit.checkpoint.gguf.types import BY_NAME, TYPES
from moefit.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")


def random_blocks(name: str, count: int) -> np.ndarray:
    """Return bytes without scales that are infinite or not a number."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (count, BY_NAME[name].nbytes), dtype=np.uint8)
    if name == "mxfp4":
        return data[data[:, 0] < 250]
    with np.errstate(all="ignore"):
        finite = np.isfinite(gguf.quants.dequantize(data, number(name))).all(axis=1)
    return data[finite]


def number(name: str):
    return gguf.GGMLQuantizationType[name.upper()]


def test_types_are_llama_cpps() -> None:
    for value, one in TYPES.items():
        assert gguf.GGMLQuantizationType(value).name.lower() == one.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(value)] == (one.values, one.nbytes)


@pytest.mark.parametrize("name", [*OWN, "iq2_xxs", "iq3_s", "iq1_m", "tq1_0"])
def test_values_equal_the_package(name: str) -> None:
    data = random_blocks(name, 2000)
    assert len(data) > 1000
    values = decode_blocks(name, torch.from_numpy(data))
    expected = torch.from_numpy(gguf.quants.dequantize(data, number(name)))
    assert values.dtype == torch.float32
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", [name for name in OWN if name != "mxfp4"])
def test_scales_that_are_not_finite_raise(name: str) -> None:
    data = torch.from_numpy(random_blocks(name, 20))
    at = {"q2_k": 80, "q3_k": 108, "q6_k": 208}.get(name, 0)
    data[3, at : at + 2] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # not a number in float16
    with pytest.raises(CheckpointError, match="scales that are not finite"):
        decode_blocks(name, data)


def test_e8m0_scale_that_is_not_a_number_raises() -> None:
    data = torch.zeros(4, 17, dtype=torch.uint8)
    data[2, 0] = 255
    with pytest.raises(CheckpointError, match="scales that are not finite"):
        decode_blocks("mxfp4", data)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(blocks, "import_module", missing)
    require_package("q4_k")
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[gguf\]'"):
        require_package("iq3_s")
