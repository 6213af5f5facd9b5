"""Options that several commands share, as records; and `--config FILE.yaml`.

`MemoryOptions` and `MissOptions` become keyword arguments of `moefit.load`. Options in a file rank
below flags and environment variables.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit.cli.app import Device, Dtype
from moefit.engine.sampler import REPETITION
from moefit.errors import ConfigError
from moefit.quant.format import FORMATS
from moefit.serve.config import AUTO_PRECISION, NATIVE_PRECISION, Policy
from moefit.serve.precision.allocate import AUTO_FORMATS
from moefit.yaml_text import load_yaml


def read_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Options by name, from a file that has no others. Raises ConfigError."""
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error
    if not isinstance(found, dict | None):
        raise ConfigError(f"{str(path)!r} has no options; it is lines such as `port: 8000`")
    options: dict[str, Any] = {}
    for key, value in (found or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{str(path)!r}: there is no option {key!r}; the nearest is {near[0]!r}"
            )
        options[name] = value
    return options


def as_given(name: str, value: Any, *, several: bool) -> str | list[str] | None:
    """An option's value as a command line would have it. Raises ConfigError for what none could.

    several: the option may be repeated; one value alone is then a list of one.

    >>> as_given("port", 8000, several=False), as_given("cors_origin", "*", several=True)
    ('8000', ['*'])
    """
    if value is None:
        return None
    if several:
        values = value if isinstance(value, list) else [value]
        return [_word(name, one, "one value, or a list of them") for one in values]
    return _word(name, value, "one value")


def _word(name: str, value: Any, wanted: str) -> str:
    if isinstance(value, bool | list | dict | None):
        raise ConfigError(f"the option {name!r} is {wanted}, but the file has {value!r}")
    return str(value)


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        known = {str(one.name): one for one in context.command.params if one.name != "config"}
        options = {
            name: as_given(name, value, several=bool(getattr(known[name], "multiple", False)))
            for name, value in read_options(path, list(known)).items()
        }
        context.default_map = {**(context.default_map or {}), **options}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with any of these options; flags and MOEFIT_* variables come before it",
        is_eager=True,
        callback=_use,
    ),
]


class ModeName(StrEnum):
    """What happens when an expert is not resident."""

    exact = "exact"
    bounded = "bounded"
    virtual = "virtual"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
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
        return ",".join(AUTO_FORMATS[:-1]) if self.precision == AUTO_PRECISION else self.precision

    def settings(self) -> dict[str, Any]:
        """The same for `LoadSettings` and `moefit.load`."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        given["dense_precision"] = given.pop("rest")
        return {**given, "dtype": self.dtype and self.dtype.torch}


@dataclass(frozen=True, slots=True, kw_only=True)
class MissOptions:
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

    @property
    def wanted(self) -> bool:
        """Whether anything was given."""
        return not (self.mode is self.prefill is self.bound is None)

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
        return {"mode": (self.mode or ModeName.exact).value, **bound, **prefill}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Which tokens may be drawn, beside --temperature and --top-p."""

    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="draw from so many tokens, 0: from all; the default's if none"),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="least share of the likeliest token's; the default's if none"
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=REPETITION[0],
            max=REPETITION[1],
            help="of tokens that are there already, 1: none; the default's if none",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was given, by the names that transformers and the server know too."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


MEMORY_OPTIONS, MISS_OPTIONS, SAMPLING_OPTIONS = MemoryOptions(), MissOptions(), SamplingOptions()
"""The defaults."""


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
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
