"""Parse device names, and check that this machine has the device before anything large is read."""

import torch

from moefit.errors import ConfigError

KINDS = ("cpu", "cuda")


def parse_device(name: str) -> torch.device:
    """Return the device called `cpu`, `cuda`, `cuda:N`, or `auto`: a GPU if there is one.

    Raises:
        ConfigError: The name is unknown, or this machine has no such device.

    >>> parse_device("cpu")
    device(type='cpu')
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(_unavailable(name, gpus)) from error
    if device.type not in KINDS or (device.index or 0) >= (gpus if device.type == "cuda" else 1):
        raise ConfigError(_unavailable(name, gpus))
    return device


def planned_device(name: str) -> torch.device:
    """Return a device as `parse_device` does, but a GPU need not exist: for estimates.

    >>> planned_device("cuda")
    device(type='cuda')
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        return parse_device(name)
    return device if device.type == "cuda" else parse_device(name)


def _unavailable(name: str, gpus: int) -> str:
    if gpus == 0:
        works = "auto or cpu"
    elif gpus == 1:
        works = "auto, cpu or cuda"
    else:
        works = f"auto, cpu, cuda, or cuda:0 to cuda:{gpus - 1}"
    return f"device={name!r} is not available here; use {works}"
