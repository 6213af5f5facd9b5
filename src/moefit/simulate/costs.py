"""What one expert costs on named hardware: `Costs` from published rates and a model's shape.

`Hardware` has rates with their source; `expert_costs` turns them into seconds for a shape of
experts.

Bytes of weights are matrices * d * width * bytes, those of a token's activations 2 * d * 2 (there
and back, 16 bits): MoNDE (arXiv 2405.18832) compares these two.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moefit.errors import ConfigError, in_brief
from moefit.serve.hybrid.costs import Costs
from moefit.yaml_text import load_yaml

T = TypeVar("T", bound=BaseModel)
ACTIVATION_BYTES = 2


class Hardware(BaseModel):
    """A GPU, the link to it, and the side on which experts lie.

    Attributes:
        name: As given to `--hardware`.
        link: Bytes per second over the link, in one direction.
        gpu_bandwidth: Bytes per second of the GPU's memory.
        gpu_flops: FLOP/s of the GPU that experts reach.
        far_bandwidth: Bytes per second at which the far side reads weights.
        far_flops: FLOP/s of the far side.
        shared: Whether copies over the link take from `far_bandwidth`, as from a host's memory.
        gpu_seconds: Fixed seconds per expert on the GPU.
        far_seconds: Fixed seconds per expert on the far side.
        layer_seconds: Seconds of a layer beyond its experts, in which the link is idle.
        source: Where the values are from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    link: float = Field(gt=0)
    gpu_bandwidth: float = Field(gt=0)
    gpu_flops: float = Field(gt=0)
    far_bandwidth: float = Field(gt=0)
    far_flops: float = Field(gt=0)
    shared: bool = False
    gpu_seconds: float = Field(default=0.0, ge=0)
    far_seconds: float = Field(default=0.0, ge=0)
    layer_seconds: float = Field(default=0.0, ge=0)
    source: str = Field(min_length=1)


class ExpertShape(BaseModel):
    """Sizes of a model's experts.

    Attributes:
        name: As given to `--shape`.
        layers: MoE layers.
        experts: Experts per layer.
        chosen: Experts per token.
        hidden_size: Model width d.
        width: Expert width.
        matrices: Matrices of an expert, 2 or 3.
        bits: Bits per weight, scales included.
        source: Where the sizes are from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    layers: int = Field(gt=0, le=1000)
    experts: int = Field(gt=0, le=100_000)
    chosen: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    width: int = Field(gt=0)
    matrices: int = Field(default=3, ge=2, le=3)
    bits: float = Field(default=16.0, gt=0, le=32)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _choose_some(self) -> Self:
        if self.chosen > self.experts:
            raise ValueError(f"{self.chosen} chosen of {self.experts} experts")
        return self

    @property
    def weights(self) -> int:
        """Weights of an expert."""
        return self.matrices * self.hidden_size * self.width

    @property
    def expert_bytes(self) -> float:
        """Bytes of an expert."""
        return self.weights * self.bits / 8

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's activations, there and back."""
        return 2 * self.hidden_size * ACTIVATION_BYTES


def expert_costs(hardware: Hardware, shape: ExpertShape) -> Costs:
    """Return seconds for a shape on some hardware: a roofline on each side, and fixed costs."""
    size, flops = shape.expert_bytes, 2 * shape.weights
    read = size / hardware.far_bandwidth
    share = hardware.link / hardware.far_bandwidth
    return Costs(
        load=size / hardware.link,
        gpu=(size / hardware.gpu_bandwidth + hardware.gpu_seconds, flops / hardware.gpu_flops),
        far=(read + hardware.far_seconds, flops / hardware.far_flops),
        far_read=read,
        activations=shape.token_bytes / hardware.link,
        shared=min(share, 0.95) if hardware.shared else 0.0,
        between=hardware.layer_seconds,
    )


def find_hardware(name: str) -> Hardware:
    """Return hardware of the data file, or of a .yaml file.

    Raises:
        ConfigError: There is none, or the file is invalid.
    """
    return _find(name, "hardware", Hardware)


def find_shape(name: str) -> ExpertShape:
    """Return a shape of the data file, or of a .yaml file.

    Raises:
        ConfigError: There is none, or the file is invalid.
    """
    return _find(name, "shapes", ExpertShape)


@cache
def known(kind: str) -> Mapping[str, Any]:
    """Return the entries of the data file: `hardware` or `shapes`, by name."""
    text = (files("moefit.simulate") / "data" / f"{kind}.yaml").read_text(encoding="utf-8")
    return load_yaml(text)[kind]


def _find(name: str, kind: str, model: type[T]) -> T:
    entries = known(kind)
    if name in entries:
        return model.model_validate({"name": name, **entries[name]})
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{name!r} is not among the known {kind}{hint}; give one of {', '.join(entries)}, or a "
            ".yaml file with the same fields"
        )
    try:
        return model.model_validate({"name": path.stem, **load_yaml(path.read_text("utf-8"))})
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValidationError, TypeError, ValueError) as error:
        fields = ", ".join(one for one in model.model_fields if one != "name")
        raise ConfigError(
            f"{path} is no valid {kind} entry: {in_brief(error, 300)}; its fields are {fields}"
        ) from error
