"""Read a model's tokenizer: from the files of a folder, or from a GGUF file's metadata."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moefit.checkpoint.gguf.header import read_gguf
from moefit.checkpoint.gguf.tokenizer import has_vocabulary, tokenizer_of
from moefit.checkpoint.model_folder import LFS, read_json_or_empty
from moefit.checkpoint.tiktoken_file import has_ranked_tokens, read_ranked_tokens
from moefit.errors import CheckpointError, in_brief
from moefit.folders import is_gguf

# Files with a vocabulary, by name or suffix; any one of them is enough for a tokenizer.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "byte_maps.json",
)
_ENDINGS = (".tiktoken", ".spm", ".vocab", ".model")


def refuse_without_tokenizer(folder: Path) -> None:
    """Raise CheckpointError if a model has no vocabulary, or Git LFS pointers; reads none."""
    if is_gguf(folder):
        if not has_vocabulary(header := read_gguf(folder)):
            tokenizer_of(header)  # raises
        return
    for name in (*_vocabularies(folder), "tokenizer_config.json"):
        if _is_pointer(folder / name):
            raise CheckpointError(
                f"{folder / name} is a Git LFS pointer in place of the file; run `git lfs pull` in "
                "its folder, or download the file again"
            )
    if not _vocabularies(folder) and not _needs_none(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES[:4])}, ...), so that it "
            "can neither read nor write text; copy the tokenizer's files there from where the "
            "model was made. The model itself takes token ids (moefit.load in Python)"
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without running code from it. Raises CheckpointError."""
    if is_gguf(folder):
        return tokenizer_of(read_gguf(folder))
    refuse_without_tokenizer(folder)
    try:
        tokenizer = _tokenizer(folder)
        size = len(tokenizer)
    except Exception as error:  # a damaged file gives KeyError, TypeError, bare Exception, ...
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {in_brief(error)}; copy the "
            "tokenizer files there again from where the model was made"
        ) from error
    if not size:
        raise CheckpointError(
            f"the tokenizer in {folder} has an empty vocabulary; copy the tokenizer files there "
            "again from where the model was made"
        )
    return tokenizer


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load with transformers; if the tokenizer has custom code, from files that need none.

    transformers would require the custom code for a family that it does not know either.
    """
    if has_ranked_tokens(folder):
        return read_ranked_tokens(folder)
    own_code = "auto_map" in read_json_or_empty(folder / "tokenizer_config.json")
    if own_code and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _vocabularies(folder: Path) -> list[str]:
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if name in _VOCABULARIES or name.endswith(_ENDINGS)]


def _needs_none(folder: Path) -> bool:
    """Whether the tokenizer is of bytes, as ByT5's and Perceiver's are."""
    kind = read_json_or_empty(folder / "tokenizer_config.json").get("tokenizer_class")
    return kind in ("ByT5Tokenizer", "PerceiverTokenizer", "CanineTokenizer")


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS)) == LFS
    except OSError:
        return False  # not a pointer; errors are reported when the file is read
