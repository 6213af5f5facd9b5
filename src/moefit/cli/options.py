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

from moefit.cli.app import ADVANCED, Device, Dtype, say
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


def warn_renamed(value: Any) -> Any:
    """Say that `--rest` has another name now, if it is given."""
    if value is not None:
        say("warning: --rest is now called --dense-precision, and the old name will be removed")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """The memory budget, and the precision that weights are held in.

    precision, dense_precision: None is not given. rest: the old name of dense_precision.
    """

    memory: Annotated[
        str | None,
        typer.Option(
            help="memory budget, such as 4.7GiB: every byte of the process on the device. "
            "Alone it chooses the best precision in which all experts fit"
        ),
    ] = None
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="compute with the checkpoint's own weights, even if experts have to be fetched",
        ),
    ] = False
    precision: Annotated[
        str | None,
        typer.Option(
            help="format of experts in memory: "
            + ", ".join(name for name in FORMATS if not name.endswith("nearest"))
            + ", or auto, which divides --memory among experts"
        ),
    ] = None
    context: Annotated[
        int, typer.Option(min=1, help="tokens that the KV cache holds, over all sequences")
    ] = 2048
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="on a GPU, most host memory for experts between storage and the GPU",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    dense_precision: Annotated[
        str | None,
        typer.Option(
            help="format of all weights but experts, as --precision but not auto",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    rest: Annotated[str | None, typer.Option("--rest", hidden=True, callback=warn_renamed)] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="the checkpoint's own if not given", rich_help_panel=ADVANCED),
    ] = None
    device: Device = "cpu"

    @property
    def experts(self) -> str:
        """Format of the experts: the checkpoint's own unless another is given."""
        return self.precision or NATIVE_PRECISION

    @property
    def dense(self) -> str:
        """Format of the other weights: the checkpoint's own unless another is given."""
        return self.dense_precision or self.rest or NATIVE_PRECISION

    @property
    def is_native(self) -> bool:
        """Whether nothing is encoded."""
        return self.experts == self.dense == NATIVE_PRECISION

    @property
    def wanted(self) -> bool:
        """Whether a budget, a format or exactness is given, so that the model is served."""
        limits = self.memory is self.host_memory is None
        return self.exact or not (limits and self.is_native)

    @property
    def to_pack(self) -> str:
        """The argument of `moefit pack --formats` that makes encoding unnecessary."""
        return ",".join(AUTO_FORMATS[:-1]) if self.experts == AUTO_PRECISION else self.experts

    def settings(self) -> dict[str, Any]:
        """Return keyword arguments of `LoadSettings` and `moefit.load`."""
        return {
            "memory": self.memory,
            "host_memory": self.host_memory,
            "precision": self.experts,
            "dense_precision": self.dense,
            "context": self.context,
            "dtype": self.dtype and self.dtype.torch,
            "device": self.device,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MissOptions:
    """What happens when an expert is not in memory."""

    mode: Annotated[
        ModeName | None,
        typer.Option(
            help="for experts that are not in memory. exact: fetch; bounded: substitute up to "
            "--bound; virtual: substitute always (SwapMoE)",
        ),
    ] = None
    prefill: Annotated[
        ModeName | None,
        typer.Option(
            help="mode for prompts: exact if not given, virtual where the mode is virtual",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="mode bounded: share of a token's router weight that may go to other experts, "
            f"{Policy().bound} if not given",
            rich_help_panel=ADVANCED,
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether anything was given."""
        return not (self.mode is self.prefill is self.bound is None)

    def refuse_vain(self) -> None:
        """Raise ConfigError for a bound that no mode uses."""
        if self.bound is not None and ModeName.bounded not in (self.mode, self.prefill):
            raise ConfigError(
                f"--bound {self.bound:g} is for the mode bounded, and the mode is "
                f"{(self.mode or ModeName.exact).value}; give --mode bounded too, or leave it out"
            )

    def settings(self) -> dict[str, Any]:
        """Return keyword arguments of `moefit.load`."""
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
        help="auto: defaults of sampling come from the model's generation_config.json; none: "
        "only its end tokens are used",
        rich_help_panel=ADVANCED,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling, beside --temperature and --top-p."""

    top_k: Annotated[
        int | None,
        typer.Option(
            min=0, help="sample from this many tokens; 0 is all of them", rich_help_panel=ADVANCED
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="least probability, as a share of the most likely token's",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=REPETITION[0],
            max=REPETITION[1],
            help="penalty on tokens that occurred already; 1 is none",
            rich_help_panel=ADVANCED,
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
