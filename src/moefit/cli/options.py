"""Options that several commands share, as records: how much memory, which precision, which mode.

Owns what may be given, its defaults, and how a record becomes options. A command that takes records
has all of their options:

    @app.command()
    @spread
    def bench(model: Model, room: Room = ROOM, misses: Misses = MISSES) -> None: ...
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from moefit.cli.app import Device, Dtype
from moefit.errors import ConfigError
from moefit.formats.format import FORMATS
from moefit.serve.ladders import AUTO
from moefit.serve.policy import Policy
from moefit.serve.settings import AUTO_PRECISION, NATIVE_PRECISION


class ModeName(StrEnum):
    """What happens when an expert is not resident."""

    exact = "exact"
    bounded = "bounded"
    virtual = "virtual"


Refetch = Annotated[
    float | None,
    typer.Option(
        help="exact, --precision auto: decoding computes experts with this share of a token's "
        "router weight, such as 0.3, from the best packed format"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that a model is given, and how it lies in it."""

    memory: Annotated[
        str | None,
        typer.Option(
            help="serve inside this budget, such as 4.7GiB: every byte of the process on the device"
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="on a GPU: the most host memory that experts may take between disk and it"
        ),
    ] = None
    precision: Annotated[
        str,
        typer.Option(
            help="format of experts in memory: "
            + ", ".join(name for name in FORMATS if not name.endswith("nearest"))
            + ", or auto: each expert the one that it deserves within --memory"
        ),
    ] = NATIVE_PRECISION
    rest: Annotated[
        str, typer.Option(help="the same for the weights that are no experts; not auto")
    ] = NATIVE_PRECISION
    context: Annotated[
        int,
        typer.Option(min=1, help="tokens at once; in a budget the KV cache is reserved for them"),
    ] = 2048
    dtype: Annotated[Dtype | None, typer.Option(help="the checkpoint's own if not given")] = None
    device: Device = "cpu"

    @property
    def is_native(self) -> bool:
        """Whether nothing is encoded."""
        return self.precision == self.rest == NATIVE_PRECISION

    @property
    def wanted(self) -> bool:
        """Whether anything asks for a budget or a format."""
        return not (self.memory is self.host_memory is None and self.is_native)

    @property
    def to_pack(self) -> str:
        """What `moefit pack --formats` would have to make."""
        return ",".join(AUTO[:-1]) if self.precision == AUTO_PRECISION else self.precision

    def settings(self) -> dict[str, Any]:
        """The same for `LoadSettings` and `moefit.load`."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**given, "dtype": self.dtype and self.dtype.torch}


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """What happens when an expert has no room."""

    mode: Annotated[
        ModeName | None,
        typer.Option(
            help="exact: fetch what is missing; bounded: substitute a little; virtual: SwapMoE",
        ),
    ] = None
    prefill: Annotated[
        ModeName | None, typer.Option(help="mode of prompts; exact, but virtual where the mode is")
    ] = None
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help=f"bounded: share of router weight that may go elsewhere, {Policy().bound} if none",
        ),
    ] = None

    refetch: Refetch = None

    @property
    def wanted(self) -> bool:
        """Whether anything was given."""
        return not (self.mode is self.prefill is self.bound is self.refetch is None)

    def refuse_vain(self) -> None:
        """Raise ConfigError for a bound that nothing goes by."""
        if self.bound is not None and ModeName.bounded not in (self.mode, self.prefill):
            raise ConfigError(
                f"--bound {self.bound:g} is for the mode bounded, and the mode is "
                f"{(self.mode or ModeName.exact).value}; give --mode bounded too, or leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """The same for `moefit.load`."""
        prefill = {} if self.prefill is None else {"prefill": self.prefill.value}
        bound = {} if self.bound is None else {"bound": self.bound}
        refetch = {} if self.refetch is None else {"refetch": self.refetch}
        return {"mode": (self.mode or ModeName.exact).value, **bound, **prefill, **refetch}


class Following(StrEnum):
    """Whether generation_config.json is followed."""

    auto = "auto"
    none = "none"


GenerationConfig = Annotated[
    Following,
    typer.Option(
        help="auto: the model's generation_config.json says how tokens are chosen where nothing "
        "else does; none: nothing but end tokens is taken from it"
    ),
]

ROOM, MISSES = Room(), Misses()
"""The defaults."""


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of each record that it takes.

    typer makes options of parameters alone. A parameter whose default is a record stands for the
    record's fields, and the record's values are their defaults.
    """
    given = signature(command, eval_str=True).parameters.values()
    records: dict[str, Any] = {
        one.name: type(one.default) for one in given if is_dataclass(one.default)
    }
    options = [option for one in given for option in _options(one)]

    @wraps(command)
    def spread_out(**values: Any) -> None:
        made = {
            name: record(**{one.name: values.pop(one.name) for one in fields(record)})
            for name, record in records.items()
        }
        command(**values, **made)

    spread_out.__signature__ = Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    spread_out.__annotations__ = {one.name: one.annotation for one in options}
    return spread_out


def _options(one: Parameter) -> list[Parameter]:
    """A parameter, or what a record stands for."""
    if not is_dataclass(one.default):
        return [one.replace(kind=Parameter.KEYWORD_ONLY)]
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            annotation=field.type,
            default=getattr(one.default, field.name),
        )
        for field in fields(one.default)
    ]
