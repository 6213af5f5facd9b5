import re

import pytest
import torch

from moefit.device import parse_device, planned_device
from moefit.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_prefers_gpu(gpus):
    gpus(0)
    assert parse_device("auto") == torch.device("cpu")
    gpus(1)
    assert parse_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_available_devices(gpus, name):
    gpus(2)
    assert parse_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("count", "name", "works"),
    [
        (0, "cuda", "use auto or cpu"),
        (0, "cuda:0", "use auto or cpu"),
        (0, "foo", "use auto or cpu"),
        (0, "", "use auto or cpu"),
        (0, "cpu:7", "use auto or cpu"),
        (1, "meta", "use auto, cpu or cuda"),
        (1, "cuda:1", "use auto, cpu or cuda"),
        (2, "cuda:99", "use auto, cpu, cuda, or cuda:0 to cuda:1"),
        (2, "cuda:-1", "use auto, cpu, cuda, or cuda:0 to cuda:1"),
        (2, "cuda:99999999999999999999", "use auto, cpu"),
    ],
)
def test_unavailable_device_names_available(gpus, count, name, works):
    gpus(count)
    message = re.escape(f"device={name!r} is not available here; {works}")
    with pytest.raises(ConfigError, match=message):
        parse_device(name)


def test_planned_gpu_need_not_exist(gpus):
    gpus(0)
    assert planned_device("cuda:3") == torch.device("cuda:3")
    assert planned_device("auto") == planned_device("cpu") == torch.device("cpu")
    for name in ("foo", "meta", "cuda:x", "cpu:7"):
        with pytest.raises(ConfigError, match="is not available here"):
            planned_device(name)
