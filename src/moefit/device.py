"""The device that a name on the command line or in a configuration means.

Owns which names there are and the check that the machine has such a device, before anything
large is read. Knows nothing of what runs there.
"""

import torch

from moefit.errors import ConfigError

KINDS = ("cpu", "cuda")


def parse_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` or `cuda:N`; `auto` is a GPU if there is one, else the CPU.

    Raises ConfigError if there is no such kind, or this machine has none or fewer of it.

    >>> parse_device("cpu")
    device(type='cpu')
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(_not_here(name, gpus)) from error
    if device.type not in KINDS or (device.index or 0) >= (gpus if device.type == "cuda" else 1):
        raise ConfigError(_not_here(name, gpus))
    return device


def planned_device(name: str) -> torch.device:
    """As `parse_device`, but a GPU need not be here: for what is only reckoned.

    >>> planned_device("cuda")
    device(type='cuda')
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        return parse_device(name)
    return device if device.type == "cuda" else parse_device(name)


def _not_here(name: str, gpus: int) -> str:
    if gpus == 0:
        works = "auto or cpu"
    elif gpus == 1:
        works = "auto, cpu or cuda"
    else:
        works = f"auto, cpu, cuda, or cuda:0 to cuda:{gpus - 1}"
    return f"device={name!r} is not to be had here; use {works}"
