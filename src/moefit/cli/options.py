"""Options of commands that load a model, records of options, and `--config FILE.yaml`.

A command takes an option as a parameter annotated with its alias (`Json`, `Device`, ...), or a
record of options (`ServingOptions`), which `expand_options` replaces by its fields.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefit.cli.app import BOUND, Mode, ModeName, Prefill, advanced, option, say
from moefit.engine.sampler import REPETITION
from moefit.errors import ConfigError
from moefit.quant.format import DECODED, FORMATS, NATIVE
from moefit.quant.kv_int8 import INT8_CACHE, MODEL_CACHE
from moefit.serve.config import AUTO_PRECISION, NATIVE_PRECISION, Policy
from moefit.serve.hybrid.rules import AUTO_COMPUTE
from moefit.serve.memory.follow import AUTO_MEMORY
from moefit.serve.precision.allocate import AUTO_FORMATS
from moefit.yaml_text import load_yaml

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """Dtypes that a model can be loaded or written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> "torch.dtype":
        """The torch dtype of that name."""
        return getattr(import_module("torch"), self.value)


def torch_dtype(dtype: Dtype | None) -> "torch.dtype | None":
    """Return the torch dtype of an option; None if it is not given."""
    return None if dtype is None else dtype.torch


class KvCache(StrEnum):
    """What the KV cache holds."""

    model = MODEL_CACHE
    int8 = INT8_CACHE


class PrefetchName(StrEnum):
    """Whether experts are read before the router has chosen them."""

    auto = "auto"
    on = "on"
    off = "off"


class HostCompute(StrEnum):
    """Which absent experts are computed in host memory."""

    auto = AUTO_COMPUTE
    fetch_all = "fetch-all"
    compute_all = "compute-all"
    monde = "monde"
    fiddler = "fiddler"
    balanced = "balanced"
    search = "search"


class Following(StrEnum):
    """Whether generation_config.json is followed."""

    auto = "auto"
    none = "none"


def _warn_renamed(value: Any) -> Any:
    """Warn if `--rest` is given."""
    if value is not None:
        say("warning: --rest is now called --dense-precision, and the old name will be removed")
    return value


Model = Annotated[
    str, typer.Argument(help="Model folder, training run, name on the Hub, or 'reference'.")
]
Device = Annotated[str, advanced("auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    Dtype | None, advanced("Dtype of weights that are not encoded. Default: the checkpoint's.")
]
Memory = Annotated[
    str | None,
    option(
        "Memory budget, such as 4.7GiB: every byte of the process on the device. Alone it "
        "chooses the best precision in which all experts fit. serve: auto follows free memory."
    ),
]
Context = Annotated[
    int,
    option(
        "Tokens that the KV cache holds from the start, over all sequences; serve and chat let it "
        "grow.",
        min=1,
    ),
]
KvCacheOption = Annotated[
    KvCache,
    advanced(
        "Keys and values in the KV cache. model: in the model's dtype; int8: rounded to eight "
        "bits, in about half the memory."
    ),
]
DensePrecision = Annotated[
    str | None,
    advanced(
        "Format of dense weights (all except experts), as --precision, but not auto; those of "
        "moefit pack --dense-formats are used. Default: the checkpoint's, or the planner's choice."
    ),
]
Rest = Annotated[str | None, typer.Option("--rest", hidden=True, callback=_warn_renamed)]
MAX_LOSS = "Plan for the highest speed with at most this increase of perplexity, such as 3%."
MIN_SPEED = "Plan for the lowest loss with at least this many tokens/s."
ForConcurrency = Annotated[
    int | None, option("Estimate for a server that runs this many requests at once.", min=1)
]
Bound = Annotated[
    float | None,
    advanced(f"{BOUND} Default: {Policy().bound}.", min=0, max=1),
]
SpeculateOption = Annotated[
    str,
    advanced(
        "Verify several tokens a step where that is faster; answers stay the same. ngram: drafts "
        "are what followed the last tokens where they occurred before; mtp: what the model's layer "
        "for multi-token prediction says; draft:MODEL: what a smaller model with the same "
        "tokenizer says. Both count in --memory."
    ),
]
InferenceRule = Annotated[
    str | None, advanced("Inference rule of a DS-MoE, such as top_k:4. Default: the model's own.")
]
TextFile = Annotated[
    Path | None,
    option(
        "UTF-8 text file. Default: the held-out standard library. For encoder-decoders: a source "
        "and its target per line, separated by a tab.",
        "--text",
    ),
]
GenerationConfig = Annotated[
    Following,
    advanced(
        "auto: sampling defaults come from the model's generation_config.json; none: only its "
        "end tokens are used."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """The memory budget, and the precision that weights are held in.

    precision, dense_precision: None is not given. rest: the old name of dense_precision.
    """

    memory: Memory = None
    exact: Annotated[
        bool,
        option(
            "Compute with the checkpoint's own weights, even if experts have to be fetched.",
            "--exact",
        ),
    ] = False
    precision: Annotated[
        str | None,
        option(
            "Format of experts in memory: "
            + ", ".join(name for name in FORMATS if not name.endswith("nearest"))
            + ", or auto, which divides --memory among experts."
        ),
    ] = None
    context: Context = 2048
    kv_cache: KvCacheOption = KvCache.model
    host_memory: Annotated[
        str | None, advanced("On a GPU: maximum host memory for experts, such as 8GiB.")
    ] = None
    host_compute: Annotated[
        HostCompute,
        advanced(
            "On a GPU: which absent experts the CPU computes in --host-memory, while others are "
            "fetched. auto: where layers take least time; or a rule of moefit simulate."
        ),
    ] = HostCompute.auto
    dense_precision: DensePrecision = None
    rest: Rest = None
    dtype: DtypeOption = None
    device: Device = "cpu"
    adapter: Annotated[
        Path | None,
        advanced("Folder of a LoRA adapter (PEFT) of dense weights, merged while loading."),
    ] = None

    @property
    def experts(self) -> str:
        """Format of the experts: the checkpoint's own unless another is given."""
        return self.precision or NATIVE_PRECISION

    @property
    def dense(self) -> str:
        """Format of the dense weights: the checkpoint's own unless another is given."""
        return self.dense_precision or self.rest or NATIVE_PRECISION

    @property
    def is_native(self) -> bool:
        """Whether nothing is encoded."""
        return {self.experts, self.dense} <= {NATIVE.name, DECODED.name}

    @property
    def sets_memory(self) -> bool:
        """Whether a budget, a format, exactness or an adapter is given."""
        limits = (
            self.memory is self.host_memory is self.adapter is None
            and self.kv_cache is KvCache.model
            and self.host_compute is HostCompute.auto
        )
        return self.exact or not (limits and self.is_native)

    @property
    def to_pack(self) -> str:
        """The argument of `moefit pack --formats` that makes encoding unnecessary."""
        return ",".join(AUTO_FORMATS[:-1]) if self.experts == AUTO_PRECISION else self.experts

    def load_settings(self) -> dict[str, Any]:
        """Return fields of `LoadSettings`.

        Raises:
            ConfigError: The budget is `auto`, which only servers have.
        """
        if self.memory == AUTO_MEMORY:
            raise ConfigError(
                "--memory auto follows free memory while a server runs, so it is for moefit serve; "
                "give a size, such as 4GiB"
            )
        return {
            "memory": self.memory,
            "host_memory": self.host_memory,
            "host_compute": self.host_compute.value,
            "precision": self.experts,
            "dense_precision": self.dense,
            "context": self.context,
            "kv_cache": self.kv_cache.value,
            "dtype": torch_dtype(self.dtype),
            "device": self.device,
            "adapter": self.adapter,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions(MemoryOptions):
    """How a model is served: memory, what happens when an expert is not resident, and plans."""

    mode: Mode = None
    prefill: Prefill = None
    bound: Bound = None
    prefetch: Annotated[
        PrefetchName,
        advanced(
            "Mode exact: read the experts early that the next layer is predicted to choose. auto: "
            "while that makes steps faster. Can gain where cores are idle while experts are read."
        ),
    ] = PrefetchName.off
    prefetch_horizon: Annotated[
        int,
        advanced("With --prefetch: layers ahead for which experts are read.", min=1, max=4),
    ] = 1
    plan: Annotated[
        Path | None, advanced("Serve by the plan in this file, from moefit plan --save.")
    ] = None
    max_loss: Annotated[str | None, advanced(MAX_LOSS)] = None
    min_speed: Annotated[float | None, advanced(MIN_SPEED)] = None

    @property
    def sets_mode(self) -> bool:
        """Whether a mode or a bound is given."""
        return not (self.mode is self.prefill is self.bound is None)

    @property
    def has_plan(self) -> bool:
        """Whether a plan, or a target to plan for, is given."""
        return not (self.plan is self.max_loss is self.min_speed is None)

    @property
    def is_served(self) -> bool:
        """Whether any option is given that only served models have."""
        prefetches = self.prefetch is not PrefetchName.off or self.prefetch_horizon > 1
        return self.sets_memory or self.sets_mode or self.has_plan or prefetches

    def check_bound(self) -> None:
        """Raise ConfigError for a bound that no mode uses."""
        if self.bound is not None and ModeName.bounded not in (self.mode, self.prefill):
            raise ConfigError(
                f"--bound {self.bound:g} is for the mode bounded, and the mode is "
                f"{(self.mode or ModeName.exact).value}; give --mode bounded too, or leave it out"
            )

    def mode_settings(self) -> dict[str, Any]:
        """Return the mode and fields of `Policy`, as keyword arguments of `moefit.load`."""
        prefill = {} if self.prefill is None else {"prefill": self.prefill.value}
        bound = {} if self.bound is None else {"bound": self.bound}
        return {"mode": (self.mode or ModeName.exact).value, **bound, **prefill}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are sampled; None leaves it to the model's or server's defaults."""

    temperature: Annotated[
        float | None,
        option(
            "Sampling temperature; 0 is greedy. Default: the model's, else greedy in generate "
            "and 0.7 in chat.",
            min=0,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        advanced("Sample from the smallest set of tokens with this probability.", min=0, max=1),
    ] = None
    top_k: Annotated[
        int | None, advanced("Sample from this many most likely tokens; 0 is all of them.", min=0)
    ] = None
    min_p: Annotated[
        float | None,
        advanced("Minimum probability, relative to the most likely token.", min=0, max=1),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        advanced(
            "Penalty on tokens that occurred before; 1 is none.",
            min=REPETITION[0],
            max=REPETITION[1],
        ),
    ] = None
    seed: Annotated[int | None, advanced("Random seed of sampling.")] = None

    def given(self) -> dict[str, Any]:
        """Return what is given, by the names that transformers and the server use."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


SERVING, SAMPLING = ServingOptions(), SamplingOptions()
"""The defaults."""


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose default is a record by the record's fields.

    typer makes options of parameters only. The default record gives the defaults of the fields. A
    field that the command takes as a parameter of its own keeps the default in the record.
    """
    given = signature(command, eval_str=True).parameters
    records: dict[str, Any] = {
        name: one.default for name, one in given.items() if is_dataclass(one.default)
    }
    options = [option for one in given.values() for option in _options(one, own=list(given))]

    @wraps(command)
    def with_records(**values: Any) -> None:
        made = {
            name: replace(
                record,
                **{
                    one.name: values.pop(one.name)
                    for one in fields(record)
                    if one.name not in given
                },
            )
            for name, record in records.items()
        }
        command(**values, **made)

    with_records.__signature__ = Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    with_records.__annotations__ = {one.name: one.annotation for one in options}
    return with_records


def _options(one: Parameter, own: Sequence[str]) -> list[Parameter]:
    """Return a parameter, or one for each field of the record that is its default but `own`."""
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
        if field.name not in own
    ]


def read_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Return the options in a YAML file by name.

    Args:
        path: The file, with lines such as `port: 8000`.
        known: Names of the command's options.

    Raises:
        ConfigError: The file cannot be read, or has an unknown option.
    """
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
    """Return an option's value as a command line would give it.

    Args:
        name: The option, for the error.
        value: From a YAML file.
        several: The option may be repeated; one value alone is then a list of one.

    Raises:
        ConfigError: No command line could give the value.

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


def _use_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults, which flags and variables override."""
    if path is not None:
        known = {str(one.name): one for one in context.command.params if one.name != "config"}
        options = {
            name: value
            if isinstance(value, bool) and getattr(known[name], "is_flag", False)
            else as_given(name, value, several=bool(getattr(known[name], "multiple", False)))
            for name, value in read_options(path, list(known)).items()
        }
        context.default_map = {**(context.default_map or {}), **options}
    return path


ConfigFile = Annotated[
    Path | None,
    option(
        "YAML file with any of these options; flags and MOEFIT_* variables override it.",
        "--config",
        is_eager=True,
        callback=_use_file,
    ),
]
