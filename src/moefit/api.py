"""What a program calls: `moefit.load`.

Owns the meaning of MODEL for serving: what `evaluate/loading.py` knows, and names on the Hugging
Face Hub. Knows nothing of how a model is served.
"""

import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moefit.checkpoint.hub import download
from moefit.errors import CheckpointError, ConfigError
from moefit.evaluate.loading import locate
from moefit.serve.config import LoadSettings, Mode, Policy
from moefit.serve.hf.skeleton import refuse_unservable
from moefit.serve.load import Progress
from moefit.serve.load import load_model as load_folder
from moefit.serve.model import ServedModel

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    model: str | Path,
    *,
    memory: str | int | None = None,
    mode: Mode = "exact",
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
    **settings: Any,
) -> ServedModel:
    """Serve a Hugging Face MoE model inside a memory budget.

    model: a folder, a training run of moefit, a name on the Hub, or `reference`.
    memory: every byte that the process may hold on the device, such as "4.7GiB"; None is all that
    it takes.
    mode: what happens when an expert is not resident: `exact` (it is fetched), `bounded` (another
    one answers if little router weight is lost), `virtual` (residents alone answer; SwapMoE).
    progress: hears what is being loaded, and how many of how many are done.
    settings: fields of `LoadSettings` and of `Policy`; `host_memory="8GiB"` bounds the experts that
    wait in host memory for a GPU.

    Gives an object with `model` and `tokenizer` (it also unpacks into the two), `generate`,
    `set_memory`, `set_mode`, `report` and `close`.

    Raises BudgetTooSmallError, naming the floor; CheckpointError, UnsupportedModelError and
    ConfigError as in `moefit.serve.load.load_model`.
    """
    if "rest" in settings:
        warnings.warn("rest is now called dense_precision", DeprecationWarning, stacklevel=2)
        settings.setdefault("dense_precision", settings.pop("rest"))
    known = {field.name for field in fields(LoadSettings)}
    changes = {field.name for field in fields(Policy)}
    if unknown := sorted(set(settings) - known - changes):
        raise ConfigError(
            f"{', '.join(unknown)}: no such setting; there are {', '.join(sorted(known | changes))}"
        )
    loading = {name: value for name, value in settings.items() if name in known}
    policy = {name: value for name, value in settings.items() if name not in known}
    chosen = LoadSettings(memory=memory, mode=mode, device=device, **loading)
    return load_folder(folder_of(model), chosen, progress=progress, **policy)


def folder_of(model: str | Path) -> Path:
    """The folder with the model's files, downloaded from the Hub if need be.

    What cannot be served is refused before its weights are downloaded.
    Raises CheckpointError if there is none, here or there; UnsupportedModelError for a model that
    cannot be served, on the Hub.
    """
    name = str(model)
    if Path(name).expanduser().exists() or not _HUB_NAME.fullmatch(name):
        return locate(name)
    try:
        return download(name, refuse_unservable)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and it cannot be had from the Hugging Face Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
