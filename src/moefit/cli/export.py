"""The commands `export` and `convert`: write a model for other engines, or as safetensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, cast

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from moefit.api import folder_of
from moefit.checkpoint.config import config_from, read_config
from moefit.checkpoint.pickled import convert_pickled
from moefit.cli.app import Json, command, console, option, print_json, say
from moefit.cli.options import Dtype, Model, torch_dtype
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.export import export_olmoe
from moefit.dsmoe.model import DsMoeForCausalLM, register
from moefit.dsmoe.remote_code import export_standalone
from moefit.errors import ConfigError
from moefit.evaluate.loading import load_full_model, locate
from moefit.gguf.families import refuse_dsmoe
from moefit.gguf.write import TYPES, write_gguf
from moefit.moe.routing import Rule
from moefit.serve.memory.budget import format_bytes


class FormatName(StrEnum):
    """What can be written."""

    olmoe = "olmoe"
    dsmoe = "dsmoe"
    gguf = "gguf"


@command("export")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder (olmoe) or file (gguf) to write.")],
    format: Annotated[
        FormatName,
        option(
            "olmoe: a checkpoint of DS-MoE or OLMoE models. dsmoe: a DS-MoE as it is, with code "
            "beside it, for trust_remote_code. gguf: a file for llama.cpp."
        ),
    ] = FormatName.olmoe,
    experts_per_token: Annotated[
        int | None,
        option(
            "Number of experts that each token uses: required with olmoe, and with gguf for a "
            "DS-MoE whose rule has none.",
            "--experts-per-token",
            "-k",
            min=1,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, option("With olmoe, dsmoe: dtype of the weights. Default: the model's own.")
    ] = None,
    type: Annotated[
        str | None,
        option(f"With gguf: type of the matrices: {', '.join(TYPES)}. Default: f16."),
    ] = None,
    tokenizer: Annotated[
        bool | None,
        option("With gguf: whether to write the tokenizer. Without, the file takes token ids."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check what is written: olmoe and dsmoe by the model's logits, gguf by its settings."""
    if format is FormatName.gguf:
        _refuse_others("gguf", dtype=dtype)
        with _stock(model, experts_per_token) as folder:
            _write_gguf(folder, out, type or "f16", tokenizer is not False, as_json=as_json)
        return
    _refuse_others(format.value, type=type, tokenizer=tokenizer)
    if format is FormatName.dsmoe:
        _refuse_others("dsmoe", experts_per_token=experts_per_token)
        _write_standalone(model, out, dtype)
        if as_json:
            print_json({"out": str(out), "format": "dsmoe"})
        return
    if experts_per_token is None:
        raise ConfigError(
            "an OLMoE has one number of experts for all tokens; give --experts-per-token K, or "
            "--format gguf for a file with the checkpoint's own number"
        )
    _write_olmoe(model, out, experts_per_token, dtype)
    if as_json:
        print_json({"out": str(out), "format": "olmoe", "experts_per_token": experts_per_token})
    say(f"wrote {out}: an OLMoE checkpoint with {experts_per_token} experts per token")


def _refuse_others(format: str, **options: object) -> None:
    """Raise ConfigError for options of the other format."""
    for name, value in options.items():
        if value is not None:
            other = "gguf" if name in ("type", "tokenizer") else "olmoe"
            raise ConfigError(
                f"--{name.replace('_', '-')} is an option of --format {other}, and the format is "
                f"{format}; leave it out, or give --format {other}"
            )


def _write_olmoe(model: str, out: Path, experts_per_token: int, dtype: Dtype | None) -> None:
    loaded, tokenizer = load_full_model(model)
    if isinstance(loaded, DsMoeForCausalLM):  # K is given here, so a threshold is no obstacle
        renormalize = Rule.parse(loaded.config.inference_rule).renormalize
        rule = Rule(kind="top_k", k=experts_per_token, renormalize=renormalize)
        loaded.config.inference_rule = str(rule)  # `export_olmoe` says why it cannot be
    export_olmoe(
        loaded,
        out,
        experts_per_token=experts_per_token,
        tokenizer=tokenizer,
        dtype=torch_dtype(dtype),
    )


def _write_standalone(model: str, out: Path, dtype: Dtype | None) -> None:
    loaded, tokenizer = load_full_model(model)
    export_standalone(loaded, out, tokenizer=tokenizer, dtype=torch_dtype(dtype))
    say(
        f"wrote {out}: a DS-MoE with the code that opens it: "
        f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)"
    )


@contextmanager
def _stock(model: str, experts_per_token: int | None) -> Iterator[Path]:
    """Yield a folder whose architecture llama.cpp may know: of a DS-MoE its form as OLMoE.

    llama.cpp's OLMoE has no grouped heads, so that keys and values are repeated there.
    """
    folder = folder_of(model)
    register()
    config = config_from(read_config(folder), folder) if folder.is_dir() else None
    if not isinstance(config, DsMoeConfig):
        _refuse_others("gguf", experts_per_token=experts_per_token)
        yield folder
        return
    rule = Rule.parse(config.inference_rule)
    if experts_per_token is None and rule.kind not in ("top_k", "dense"):
        raise ConfigError(
            "llama.cpp uses one number of experts for all tokens, and this model's rule is "
            f"{rule}; give --experts-per-token K, and measure what that costs with moefit eval "
            "--rule top_k:K"
        )
    k = experts_per_token or rule.k or config.num_experts
    config.inference_rule = str(Rule(kind="top_k", k=k, renormalize=rule.renormalize))
    refuse_dsmoe(config)
    loaded, tokenizer = load_full_model(model)
    cast(DsMoeForCausalLM, loaded).set_inference_rule(Rule.parse(config.inference_rule))
    with TemporaryDirectory(prefix="moefit-") as made:
        path = Path(made) / folder.name
        export_olmoe(loaded, path, experts_per_token=k, tokenizer=tokenizer, grouped=False)
        yield path


def _write_gguf(folder: Path, out: Path, type: str, with_tokenizer: bool, *, as_json: bool) -> None:
    with _writing() as progress:
        made = write_gguf(
            folder, out, type=type.lower(), with_tokenizer=with_tokenizer, progress=progress
        )
    if as_json:
        print_json(
            {
                "out": str(made.path),
                "format": "gguf",
                "architecture": made.architecture,
                "type": made.type,
                "bytes": made.nbytes,
                "tokenizer": made.has_vocabulary,
            }
        )
    takes = "" if made.has_vocabulary else "; it has no tokenizer and takes token ids"
    say(
        f"wrote {out}: {made.architecture} in {made.type}, {format_bytes(made.nbytes)}, for "
        f"llama.cpp{takes}"
    )


@command("convert")
def convert(
    model: Annotated[str, typer.Argument(help="Folder of the model.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    as_json: Json = False,
) -> None:
    """Read tensors alone, run no code, and name the folder when it is complete."""
    with _writing() as progress:
        made = convert_pickled(locate(model), out, progress)
    if as_json:
        print_json(made.as_dict())
    say(
        f"wrote {made.folder}: {made.tensors:,} tensors in {made.files:,} "
        f"file{'s' if made.files > 1 else ''}, {format_bytes(made.nbytes)}"
    )


@contextmanager
def _writing() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of bytes, and yield what advances it."""
    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
