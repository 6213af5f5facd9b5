"""Download a model from the Hugging Face Hub: small files first, then its weights.

The caller checks the small files, so that an unsupported model is rejected before gigabytes are
downloaded. huggingface_hub downloads, caches and resumes.
"""

import re
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from moefit.checkpoint.model_folder import ADAPTER, named_weights
from moefit.checkpoint.safetensors import INDEX, SINGLE, weight_map
from moefit.errors import CheckpointError

# Configuration, tokenizer and templates.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Other forms of the same model (gpt-oss's original/, Mistral's consolidated files) and files of
# training. Templates in a subfolder belong to the tokenizer and are small.
_NEVER = (
    "*/*.json",
    "*/*.model",
    "*/*.txt",
    "*/*.tiktoken",
    "consolidated*",
    "params.json",
    "trainer_state.json",
    "optimizer*",
)


def download(
    name: str, refuse: Callable[[Path], None], *, endpoint: str | None = None, **where: Any
) -> Path:
    """Fetch a model and return its folder.

    Args:
        name: The repository, such as "Qwen/Qwen3-30B-A3B".
        refuse: Called with the folder before any weights are in it; raises for a model that
            cannot be served.
        endpoint: Address of another Hub.
        where: Further arguments of `huggingface_hub.snapshot_download`, such as `cache_dir`.

    Raises:
        CheckpointError: The repository has no weights that can be read.
        OSError: The download failed.
        Exception: Whatever `refuse` raises.
    """
    where = {"endpoint": endpoint, **where}
    folder = Path(
        snapshot_download(name, allow_patterns=list(_SMALL), ignore_patterns=list(_NEVER), **where)
    )
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
        raise _no_model(name, endpoint)
    refuse(folder)
    weights = _shards(folder) if (folder / INDEX).is_file() else [SINGLE]
    # Use the commit of the small files for all files.
    fetched = Path(
        snapshot_download(
            name, revision=folder.name, allow_patterns=[escape(one) for one in weights], **where
        )
    )
    if missing := [shard for shard in weights if not (fetched / shard).is_file()]:
        if missing == [SINGLE]:
            raise _no_model(name, endpoint)
        raise CheckpointError(
            f"{name} on the Hub lacks {len(missing)} of the {len(weights)} shards that its {INDEX} "
            f"names ({', '.join(missing[:3])}); tell its authors, or give another repository"
        )
    return fetched


def _shards(folder: Path) -> Sequence[str]:
    """Return the files that the index names."""
    shards = sorted(set(weight_map(folder / INDEX).values()))
    if wrong := [one for one in shards if not re.fullmatch(r"[\w.-]+\.safetensors", str(one))]:
        raise CheckpointError(
            f"{folder / INDEX} names {wrong[0]!r}, which is no safetensors file beside it; give "
            "another repository of the model"
        )
    return shards


def _no_model(name: str, endpoint: str | None) -> CheckpointError:
    """Return an error that describes the repository's files."""
    files = HfApi(endpoint=endpoint).list_repo_files(name)
    what = named_weights([one for one in files if "/" not in one], f"{name} on the Hub")
    return CheckpointError(
        what
        or f"{name} on the Hub is no model with safetensors: it has "
        f"{', '.join(sorted(files)[:5]) or 'no files'}; give a repository with config.json and "
        f"{SINGLE} or {INDEX}"
    )
