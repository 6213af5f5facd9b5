"""Serving cost: bytes against the estimate of a real model, and Yun et al.'s throughput."""

import math
from pathlib import Path

import pytest
import torch

from moefit.advise.hardware import Device, find_device, known_devices, measure_this
from moefit.advise.serving import PRECISIONS, Limits, memory_cost, served_sizes
from moefit.advise.shapes import Shape
from moefit.advise.throughput import Roofline, Traffic, traffic_cost
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.quant.cpu_kernels import kernels
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.estimate import memory_budget

SHAPE = Shape(width=128, layers=2, experts=4, vocabulary=512)
LAPTOP = Device(name="laptop", memory=16e9, bandwidth=20e9, flops=2e11, source="test", is_gpu=False)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_bytes_are_those_of_the_planner(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DsMoeConfig(vocab_size=SHAPE.vocabulary, **SHAPE.model_fields(128))
    DsMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    sizes = served_sizes(SHAPE, precision, context=128, is_gpu=False)
    settings = LoadSettings(
        precision=precision,
        dense_precision=sizes.dense_precision,
        context=128,
        dtype=torch.bfloat16,
        device="cpu",
    )
    real = memory_budget(build_skeleton(tmp_path, torch.bfloat16), settings)
    found = sizes.budget
    assert found.kv_cache == real.kv_cache
    assert found.workspace == pytest.approx(real.workspace, rel=1e-9)
    assert [one.slot_bytes for one in found.blocks] == [one.slot_bytes for one in real.blocks]
    assert found.weights == pytest.approx(real.weights, rel=0.005)


def test_bytes_read_are_those_of_active_weights() -> None:
    shape = Shape(width=1024, layers=16, experts=8)
    sizes = served_sizes(shape, "native", context=512, is_gpu=False)
    cost = memory_cost(sizes, LAPTOP, Limits(position=100.0))
    assert cost is not None
    multiplied = shape.active - shape.vocabulary * shape.width
    expected = 2 * multiplied + 100 * 2 * 2 * 1024 * 16
    assert cost.read == pytest.approx(expected, rel=0.002)
    assert cost.seconds == pytest.approx(cost.read / 20e9)
    assert cost.fetched == 0
    assert sizes.expert_read == 2 * shape.expert_parameters
    on_gpu = served_sizes(shape, "int3", context=512, is_gpu=True)
    on_cpu = served_sizes(shape, "int3", context=512, is_gpu=False)
    assert on_gpu.expert_bytes(1) == on_cpu.expert_bytes(1) < on_gpu.expert * shape.layers
    eighth = served_sizes(shape, "int8", context=512, is_gpu=False)
    faster = memory_cost(eighth, LAPTOP, Limits(position=100.0))
    assert faster is not None
    assert 0.5 < faster.read / cost.read < 0.56


def test_missing_experts_are_read_from_storage() -> None:
    shape = Shape(width=1024, layers=16, experts=8)
    sizes = served_sizes(shape, "native", context=512, is_gpu=False)
    half = sizes.budget.fixed + 16 * 4 * sizes.expert
    assert memory_cost(sizes, LAPTOP, Limits(memory=half)) is None
    cost = memory_cost(sizes, LAPTOP, Limits(memory=half, storage_bandwidth=2e9))
    assert cost is not None
    assert cost.fetched == 16 * (1 - 4 / 8) * sizes.expert
    assert cost.resident == half
    small = Limits(memory=sizes.budget.min_bytes - 1, storage_bandwidth=2e9)
    assert memory_cost(sizes, LAPTOP, small) is None


def test_precisions_take_fewer_bytes_in_their_order() -> None:
    shape = Shape(width=512, layers=8, experts=8)
    resident = [served_sizes(shape, p, context=512, is_gpu=False).resident for p in PRECISIONS]
    assert resident == sorted(resident, reverse=True)


def test_throughput_is_yuns_formula() -> None:
    """T = b / (prompt(p b/n) + decode(b)), computed here by hand for a dense model."""
    shape = Shape(width=1024, layers=16)
    device = known_devices()["a100-40gb"]
    traffic = Traffic(requests=1.0, prompt=200.0, answer=100.0)
    sizes = served_sizes(shape, "native", context=512, is_gpu=True)
    limits = Limits(memory=2.0e9)
    found = traffic_cost(sizes, device, limits, traffic)
    assert found is not None
    per_token = 2 * 2 * 16 * 1024
    held = sizes.resident - sizes.budget.kv_cache
    b = min((2.0e9 - held) / ((200 + 50) * per_token), 256)
    active = shape.active - shape.vocabulary * shape.width
    weights = 2 * active
    prompt = max(2 * active * 200 * b / 100 / 312e12, weights / 1.555e12)
    decode = max(2 * active * b / 312e12, (weights + b * 250 * per_token) / 1.555e12)
    assert found.sequences == pytest.approx(b)
    assert found.tokens_per_second == pytest.approx(b / (prompt + decode), rel=0.01)
    assert found.device_seconds == pytest.approx(1 / found.tokens_per_second)


def test_more_devices_are_used_where_a_model_needs_them() -> None:
    shape = Shape(width=2048, layers=32, experts=16)
    device = known_devices()["l4"]
    sizes = served_sizes(shape, "native", context=512, is_gpu=True)
    assert sizes.resident > 24e9
    assert traffic_cost(sizes, device, Limits(), Traffic(requests=1.0)) is None
    found = traffic_cost(sizes, device, Limits(), Traffic(requests=1.0, devices=6))
    assert found is not None
    assert found.devices in (2, 4)
    assert found.capacity == found.tokens_per_second * (6 // found.devices)


def test_steps_of_many_tokens_read_more_experts() -> None:
    sizes = served_sizes(SHAPE, "native", context=128, is_gpu=True)
    device = known_devices()["h100"]
    roofline = Roofline(device=device, position=10.0)
    assert sizes.expert_bytes(1) == 2 * sizes.expert_read
    assert sizes.expert_bytes(2) == pytest.approx(2 * 4 * (1 - 0.75**2) * sizes.expert_read)
    assert sizes.expert_bytes(1000) == pytest.approx(2 * 4 * sizes.expert_read)
    assert roofline.decode(sizes, 8, 1) == pytest.approx(2 * roofline.decode(sizes, 8, 2))


def test_measured_latencies_are_interpolated(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "memory: 4.0e+10\nbandwidth: 1.0e+12\nflops: 1.0e+14\nsource: measured by us\n"
        "latencies:\n"
        "- {parameters: 1.0e+8, prompt: {100: 0.01, 1000: 0.02}, decode: {1: 0.001, 256: 0.004}}\n"
        "- {parameters: 1.0e+9, prompt: {100: 0.02, 1000: 0.08}, decode: {1: 0.008, 256: 0.016}}\n"
    )
    device = find_device(str(file))
    assert device.basis == "latencies measured: measured by us"
    shape = Shape(width=1024, layers=16)
    sizes = served_sizes(shape, "native", context=512, is_gpu=True)
    found = traffic_cost(sizes, device, Limits(), Traffic(requests=1.0, prompt=200, answer=100))
    assert found is not None
    assert found.sequences == 256
    between = (shape.active - 1e8) / 9e8
    tokens = (200 * 2.56 - 100) / 900
    prompt = (0.01 + 0.01 * tokens) * (1 - between) + (0.02 + 0.06 * tokens) * between
    decode = 0.004 * (1 - between) + 0.016 * between
    assert found.tokens_per_second == pytest.approx(256 / (prompt + decode))


def test_hardware_names_its_source_and_basis() -> None:
    for device in known_devices().values():
        assert device.source
        assert device.basis.startswith("roofline")
    assert find_device("H100").flops == 989e12


@pytest.mark.parametrize(
    ("name", "words"),
    [("h1000", "did you mean 'h100'"), ("none.yaml", "cannot read the hardware")],
)
def test_unknown_hardware_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_device(name)


def test_hardware_without_a_source_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("memory: 1.0e+9\nbandwidth: 1.0e+9\nflops: 1.0e+9\n")
    with pytest.raises(ConfigError, match="source") as raised:
        find_device(str(file))
    assert "http" not in str(raised.value)
    valid = file.read_text() + "source: test\n"
    for change, words in (
        ("rates: {int8: 0}", "rates.int8.* greater than 0"),
        ("rates: {int7: 1.0e+9}", "'int7' is not a format; use some of native, int8"),
        ("latencies: [{parameters: 1.0, prompt: {0: 1}, decode: {1: 1}}]", "greater than 0"),
        ("latencies: [{parameters: 1.0, prompt: {1: 1}, decode: {1: -1}}]", "greater than 0"),
        ("latencies: [{parameters: 1.0, prompt: {1: .nan}, decode: {1: 1}}]", "finite number"),
    ):
        file.write_text(f"{valid}{change}\n")
        with pytest.raises(ConfigError, match=words):
            find_device(str(file))
    file.write_text("- 3\n")
    with pytest.raises(ConfigError, match="does not describe hardware"):
        find_device(str(file))


def test_this_machine_is_measured_or_refused() -> None:
    if kernels() is None:
        with pytest.raises(ConfigError, match="without compiled kernels"):
            measure_this()
        return
    device = measure_this(formats=("native", "int8"))
    assert device.rate("int8") > 1e8
    assert device.bandwidth == max(device.rates.values())
    assert 0 <= device.layer_seconds < 1
    assert math.isfinite(device.flops)
    assert device.flops > 1e8
    assert not device.is_gpu
    assert device.basis.startswith("bytes per second measured")
