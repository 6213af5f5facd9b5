"""Devices that train or serve: from a data file with sources, from the user's file, or measured.

"this" is the machine that runs the command: its bytes per second are those of moefit's own kernels
with one token, per format, since most kernels are slower than the memory, and the time of a layer
beyond them is that of the shipped model, whose weights are small.
"""

import difflib
import os
import time
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moefit.errors import ConfigError, in_brief
from moefit.evaluate.bandwidth import Bandwidth
from moefit.evaluate.loading import REFERENCE, locate
from moefit.evaluate.speed import measure_speed
from moefit.host import available_bytes, total_bytes
from moefit.quant.cpu_kernels import KernelMatrix, Kernels, Weight, kernels, status
from moefit.quant.format import NATIVE, GroupedFormat, parse_format
from moefit.quant.grouped_int import GroupedMatrix, codes_bytes, meta_bytes
from moefit.serve.cache.slot import host_bytes
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.yaml_text import load_yaml

THIS = "this"
_MEASURED = 256 << 20  # bytes of weights that are read, more than most caches hold
_COLUMNS, _ROWS, _MANY = 2048, 4096, 64  # of a matrix; tokens that measure FLOP/s
_ROUNDS = 4
_FORMATS = ("native", "int8", "int6", "int5", "int4", "int3", "int2")
_DECODED = 32  # tokens, to time what a layer takes beyond its weights


_Positive = Annotated[float, Field(gt=0)]


class LatencyPoint(BaseModel):
    """Measured seconds of one model on some devices, by tokens or sequences at once.

    Attributes:
        parameters: Active parameters of the model, with embeddings.
        devices: Devices that share it.
        prompt: Seconds of a pass over prompts, by their tokens.
        decode: Seconds of a step, by the sequences that each get one token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    parameters: float = Field(gt=0)
    devices: int = Field(default=1, gt=0)
    prompt: Mapping[_Positive, _Positive] = Field(min_length=1)
    decode: Mapping[_Positive, _Positive] = Field(min_length=1)


class Device(BaseModel):
    """What a device can do.

    Attributes:
        name: As given to `--hardware`.
        memory: Bytes.
        bandwidth: Bytes per second from memory.
        flops: Dense 16-bit FLOP/s.
        source: Where the values are from.
        rates: Measured bytes per second of weights by format, where they are known.
        latencies: Measured latencies, where they are known.
        layer_seconds: Per layer of a pass, beyond reading and multiplying.
        is_gpu: Whether the process itself lies outside its memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    memory: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    flops: float = Field(gt=0)
    source: str = Field(min_length=1)
    rates: Mapping[str, _Positive] = {}
    latencies: tuple[LatencyPoint, ...] = ()
    layer_seconds: float = Field(default=0.0, ge=0)
    is_gpu: bool = True

    @field_validator("rates")
    @classmethod
    def _check_formats(cls, rates: Mapping[str, float]) -> Mapping[str, float]:
        for name in rates:
            if name not in _FORMATS:
                raise ValueError(f"{name!r} is not a format; use some of {', '.join(_FORMATS)}")
        return rates

    def rate(self, format: str) -> float:
        """Return bytes per second that weights of a format are read and multiplied at."""
        return self.rates.get(format, self.bandwidth)

    @property
    def basis(self) -> str:
        """What speeds are based on: measured latencies, measured rates, or a roofline."""
        if self.latencies:
            return f"latencies measured: {self.source}"
        if self.rates:
            return f"bytes per second measured: {self.source}"
        return f"roofline, an upper bound: {self.source}"


def find_device(name: str) -> Device:
    """Return a device of the data file, of a .yaml file, or this machine, measured.

    Raises:
        ConfigError: There is no such device or file, or the file is invalid.
    """
    if name == THIS:
        return measure_this()
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return _read_device(Path(name))
    known = known_devices()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{name!r} is not known hardware{hint}; use {THIS}, one of {', '.join(known)}, or a .yaml "
        "file with memory, bandwidth, flops and source"
    )


@cache
def known_devices() -> Mapping[str, Device]:
    """Return the devices of the data file by name."""
    text = (files("moefit.advise") / "data" / "hardware.yaml").read_text(encoding="utf-8")
    return {name: Device(name=name, **one) for name, one in load_yaml(text)["devices"].items()}


def _read_device(path: Path) -> Device:
    try:
        tree: Any = load_yaml(path.read_text(encoding="utf-8"))
        return Device.model_validate({"name": path.stem, **tree})
    except OSError as error:
        raise ConfigError(f"cannot read the hardware {path}: {error.strerror}") from error
    except (ValidationError, TypeError) as error:
        raise ConfigError(
            f"{path} does not describe hardware: {in_brief(error, 400)}; it needs memory (bytes), "
            "bandwidth (bytes/s), flops (FLOP/s) and source, and may have latencies"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def measure_this(formats: tuple[str, ...] = _FORMATS) -> Device:
    """Return this machine with measured rates, in a few seconds.

    Args:
        formats: Whose rates are measured; native among them.

    Raises:
        ConfigError: There are no compiled kernels, or too little memory to measure.
    """
    compiled = kernels()
    if compiled is None:
        raise ConfigError(
            f"this machine cannot be measured without compiled kernels ({status()}); give "
            "--hardware FILE.yaml with its memory, bandwidth, flops and source"
        )
    if available_bytes() < 2 * _MEASURED:
        raise ConfigError(
            f"measuring takes {2 * _MEASURED >> 20} MiB, and {available_bytes() >> 20} MiB are "
            "free; free memory, or give --hardware FILE.yaml with memory, bandwidth, flops, source"
        )
    rates = {name: _read_rate(compiled, name) for name in formats}
    return Device(
        name=THIS,
        memory=total_bytes(),
        bandwidth=max(rates.values()),
        flops=_flops(compiled),
        source=f"kernels of level {compiled.level}, {torch.get_num_threads()} threads{_load()}",
        rates=rates,
        layer_seconds=_layer_seconds(rates[NATIVE.name]),
        is_gpu=False,
    )


def _load() -> str:
    """Return a note if other processes use the processors, so that what is measured is too low."""
    load, processors = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < processors + 0.5:
        return ""
    return f"; the machine is busy (load {load:.1f} on {processors} processors): measure again"


def _layer_seconds(rate: float) -> float:
    """Decode with the shipped model; return the seconds per layer beyond reading its weights."""
    served = load_model(locate(REFERENCE), LoadSettings(context=2 * _DECODED, device="cpu"))
    try:
        layers = served.model.config.num_hidden_layers
        prompt_T = torch.arange(_DECODED // 2)
        bounds = Bandwidth(storage=rate, memory=rate)
        speed = measure_speed(served, bounds, prompt_T=prompt_T, new_tokens=_DECODED)
    finally:
        served.close()
    return max(0.0, speed.median_seconds - speed.memory_bound) / layers


def _read_rate(compiled: Kernels, name: str) -> float:
    """Multiply matrices with one token; return their bytes per second."""
    layers = [_random_matrix(name)]
    size = _nbytes(layers[0])
    layers += [_random_matrix(name) for _ in range(_MEASURED // size)]
    matrices = [KernelMatrix(one) for one in layers]
    x_1I = torch.randn(1, _COLUMNS, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for one in matrices:
            compiled.linear(x_1I, one, torch.bfloat16)
        seconds.append(time.perf_counter() - began)
    return size * len(matrices) / min(seconds)


def _flops(compiled: Kernels) -> float:
    """Return FLOP/s of int8 matrices with many tokens, as in prompts."""
    matrix = KernelMatrix(_random_matrix("int8"))
    x_TI = torch.randn(_MANY, _COLUMNS, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        compiled.linear(x_TI, matrix, torch.bfloat16)
        seconds.append(time.perf_counter() - began)
    return 2 * _MANY * _ROWS * _COLUMNS / min(seconds)


def _random_matrix(name: str) -> Weight:
    """Return random weights as slots hold them; their values do not affect speed."""
    format = parse_format(name)
    if not isinstance(format, GroupedFormat):
        memory = host_bytes(_ROWS * _COLUMNS * 2).view(torch.bfloat16).view(_ROWS, _COLUMNS)
        return memory.fill_(0.01)
    sizes = codes_bytes(_ROWS, _COLUMNS, format.bits), meta_bytes(_ROWS, _COLUMNS, format.bits)
    shaped = GroupedMatrix.empty(1, _COLUMNS, format.bits).meta_RMG.shape
    memory = host_bytes(sum(sizes)).fill_(0x11)
    meta = memory[sizes[0] :].view(torch.float16).fill_(1e-3)
    return GroupedMatrix(
        format.bits, _COLUMNS, memory[: sizes[0]].view(_ROWS, -1), meta.view(_ROWS, *shaped[1:])
    )


def _nbytes(weight: Weight) -> int:
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return weight.codes_RB.nbytes + weight.meta_RMG.nbytes
