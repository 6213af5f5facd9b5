"""Upload a model with its card to the Hugging Face Hub.

What is uploaded is the model's folder as transformers reads it, without a trainer's state, and the
page of `write_page` if there is one. A DS-MoE gets the code that opens it without moefit; models of
transformers' own classes need none.
"""

import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from moefit.checkpoint.config import CONFIG
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.remote_code import add_code
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError, in_brief
from moefit.folders import is_gguf
from moefit.report.write import CARD, HTML

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_MODEL = (
    CONFIG,
    "generation_config.json",
    *(f"*{ending}" for ending in _WEIGHTS),
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_PAGE = (CARD, HTML, "*.png")


def files_of(model: Path, page: Path | None) -> dict[str, Path]:
    """Return what is uploaded: files by their names in the repository.

    Args:
        model: A model's folder.
        page: The folder of its page; None without one.

    Raises:
        UnsupportedModelError: It is a GGUF file.
    """
    if is_gguf(model):
        raise UnsupportedModelError(
            f"{model} is a GGUF file, and the folder of a transformers model is uploaded; upload "
            "the file with `hf upload REPO FILE`"
        )
    found = {path.name: path for pattern in _MODEL for path in sorted(model.glob(pattern))}
    if page is not None:
        found |= {path.name: path for pattern in _PAGE for path in sorted(page.glob(pattern))}
    return {name: path for name, path in found.items() if path.is_file()}


def push(  # noqa: PLR0913 - keywords
    model: Path,
    repo: str,
    *,
    page: Path | None = None,
    name: str | None = None,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a model, creating the repository if there is none.

    Args:
        model: A model's folder.
        repo: Name of the repository, such as `me/model`.
        page: Folder of the model's page.
        name: How the page's commands call the model; in the repository they have the latter's name.
        private: Whether a repository that is created is private.
        revision: Branch; None for the main one.
        endpoint: Address of another Hub.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The name is not one of a repository.
        CheckpointError: The Hub refused, or cannot be reached.
        UnsupportedModelError: As `files_of` does.
    """
    api = HfApi(endpoint=endpoint)
    with _staged(files_of(model, page)) as folder:
        if page is not None and name is not None:
            _rename(folder, name, repo)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            made = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message="Upload the model and its card",
                delete_patterns=_weights_there(api, repo, revision),
            )
        except HFValidationError as error:
            raise ConfigError(f"{repo!r} cannot name a repository: {in_brief(error)}") from error
        except Exception as error:  # errors of the HTTP library are of its own types
            raise CheckpointError(
                f"uploading to {repo} failed: {in_brief(error)}; {_remedy(error)}"
            ) from error
    return made.commit_url


def _rename(folder: Path, name: str, repo: str) -> None:
    """Let the commands on a staged page name the repository."""
    for file, quoted in ((CARD, shlex.quote(name)), (HTML, html.escape(shlex.quote(name)))):
        path = folder / file
        if path.is_file():
            pattern = (
                rf"(?m)^((?:<pre><code>)?moefit (?:serve|eval) ){re.escape(quoted)}(?=[\s<]|$)"
            )
            text = re.sub(pattern, rf"\g<1>{repo}", path.read_text(encoding="utf-8"))
            path.unlink()  # a link to the page's own file
            path.write_text(text, encoding="utf-8")


def _weights_there(api: HfApi, repo: str, revision: str | None) -> list[str] | None:
    """Return the weight files beside the configuration, which those of this model replace.

    Shards of an earlier upload would be read too. Files in folders are left alone.
    """
    names = api.list_repo_files(repo, revision=revision)
    found = [name for name in names if "/" not in name and name.endswith(_WEIGHTS)]
    return [escape(name) for name in found] or None


def _remedy(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "log in with `hf auth login` or set HF_TOKEN to a token that may write there"
    return "the same line uploads only what is not there yet"


@contextmanager
def _staged(files: dict[str, Path]) -> Iterator[Path]:
    """Link the files into a temporary folder; a DS-MoE's configuration names the code beside it."""
    with TemporaryDirectory(prefix="moefit-push-") as name:
        folder = Path(name)
        for target, path in files.items():
            (folder / target).symlink_to(path.resolve())
        config = folder / CONFIG
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if family == DsMoeConfig.model_type:
            config.unlink()
            shutil.copyfile(files[CONFIG], config)
            add_code(folder)
        yield folder
