"""The Python entry point: `moefit.load`.

Resolves a model given as a folder, a training run, `reference` or a name on the Hugging Face Hub,
and loads it with `serve/load.py`.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
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

    Args:
        model: A folder, a training run of moefit, a name on the Hub, or `reference`.
        memory: Budget for every byte of the process on the device, such as "4.7GiB"; None means as
            much as it takes.
        mode: How steps handle experts that are not resident: `exact` loads them, `bounded`
            substitutes others if little router weight is lost, `virtual` uses residents only
            (SwapMoE).
        device: `cpu`, `cuda` or `cuda:N`.
        progress: Called with what is being loaded, how many of it are done, and how many there are.
        settings: Fields of `LoadSettings` and `Policy`, such as `precision="int4"`; `dtype` is a
            torch dtype or its name.

    Returns:
        A `ServedModel` with `model` and `tokenizer` (it also unpacks into these two), `generate`,
        `set_memory`, `set_mode`, `report` and `close`.

    Raises:
        BudgetTooSmallError: The budget is below the minimum, which the message names.
        CheckpointError: The checkpoint is missing or damaged.
        UnsupportedModelError: The model cannot be served, or not in this mode.
        ConfigError: A setting is unknown or invalid.
    """
    if "rest" in settings:
        warnings.warn("rest is now called dense_precision", DeprecationWarning, stacklevel=2)
        settings.setdefault("dense_precision", settings.pop("rest"))
    load_fields = {field.name for field in fields(LoadSettings)}
    policy_fields = {field.name for field in fields(Policy)}
    if unknown := sorted(set(settings) - load_fields - policy_fields):
        raise ConfigError(
            f"unknown setting {', '.join(unknown)}; "
            f"use {', '.join(sorted(load_fields | policy_fields))}"
        )
    loading = {name: value for name, value in settings.items() if name in load_fields}
    if loading.get("draft") is not None:
        loading["draft"] = draft_folder_of(loading["draft"])
    policy = {name: value for name, value in settings.items() if name not in load_fields}
    if isinstance(name := loading.get("dtype"), str):
        found = getattr(torch, name.removeprefix("torch."), None)
        if isinstance(found, torch.dtype):  # other names are refused with the settings
            loading["dtype"] = found
    chosen = LoadSettings(memory=memory, mode=mode, device=device, **loading)
    return load_folder(folder_of(model), chosen, progress=progress, **policy)


def folder_of(model: str | Path) -> Path:
    """Return the folder with a model's files, downloaded from the Hub if necessary.

    Models that cannot be served are refused before their weights are downloaded.

    Args:
        model: As for `load`.

    Raises:
        CheckpointError: There is no such model, neither here nor on the Hub.
        UnsupportedModelError: The model on the Hub cannot be served.
    """
    return _folder_of(model, refuse_unservable)


def draft_folder_of(model: str | Path) -> Path:
    """Return the folder of a draft model, as `folder_of`; it may have no experts."""
    return _folder_of(model, lambda folder: None)


def _folder_of(model: str | Path, refuse: Callable[[Path], None]) -> Path:
    name = str(model)
    if Path(name).expanduser().exists() or not _HUB_NAME.fullmatch(name):
        return locate(name)
    try:
        return download(name, refuse)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and downloading it from the Hugging Face Hub failed: "
            f"{str(error).splitlines()[0]}"
        ) from error
