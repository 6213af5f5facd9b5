"""Train a byte-level BPE tokenizer, or load one; every tokenizer has an end-of-text token."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moefit.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BYTES = 256

# Common end-of-text tokens of tokenizers without a tokenizer_config.json.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")

TOKENIZER_JSON = "tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")
ALL_FILES = (
    TOKENIZER_JSON,
    *GPT2_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens; a small corpus yields fewer.

    Any text can be encoded and decoded without loss. Each digit is a token of its own.
    """
    assert vocab_size > BYTES, f"{vocab_size} is too few for all bytes and {END_OF_TEXT}"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend, END_OF_TEXT)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a tokenizer.json, or from a folder in Hugging Face or GPT-2 layout.

    Raises:
        DataError: It is missing or damaged, or has no end-of-text token.
    """
    files = tokenizer_files(path)
    folder = files[0].parent
    names = {file.name for file in files}
    try:
        if "tokenizer_config.json" in names and TOKENIZER_JSON in names:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = _load_without_config(files[0])
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(
            f"the tokenizer in {folder} cannot be read ({error}); save it again with "
            "save_pretrained, or leave data.tokenizer out to train one on the corpus"
        ) from error
    if tokenizer.eos_token_id is None:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        raise DataError(
            f"the tokenizer in {folder} has no end-of-text token, which separates documents "
            f"(its special tokens: {', '.join(special[:8]) or 'none'}); set eos_token in "
            f"{folder / 'tokenizer_config.json'}"
        )
    return tokenizer


def tokenizer_files(path: str | Path) -> list[Path]:
    """Return the files of the tokenizer at `path`, the one with the vocabulary first.

    Raises:
        DataError: There is no tokenizer.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise DataError(
            f"data.tokenizer={str(path)!r} does not exist; give a {TOKENIZER_JSON} or a folder "
            "with one, or leave it out to train one on the corpus"
        )
    if given.is_file() and given.name not in ALL_FILES:
        return [given]  # a tokenizer.json of another name; other files beside it are unrelated
    folder = given if given.is_dir() else given.parent
    found = [folder / name for name in ALL_FILES if (folder / name).is_file()]
    names = {file.name for file in found}
    if TOKENIZER_JSON not in names and not names.issuperset(GPT2_FILES):
        raise DataError(
            f"{folder} (data.tokenizer) has {', '.join(sorted(names)) or 'no tokenizer file'}, "
            f"but a tokenizer is a {TOKENIZER_JSON}, or {' with '.join(GPT2_FILES)}; "
            "give a folder with these, or leave it out to train one on the corpus"
        )
    return found


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the rows that an embedding needs: more than len(tokenizer) if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _load_without_config(file: Path) -> PreTrainedTokenizerFast:
    if file.name == GPT2_FILES[0]:
        vocabulary, merges = (str(file.parent / name) for name in GPT2_FILES)
        backend = Tokenizer(models.BPE.from_file(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer.from_file(str(file))
    known = backend.get_vocab(with_added_tokens=True)
    return _wrap(backend, next((end for end in KNOWN_ENDS if end in known), None))


def _wrap(backend: Tokenizer, end_of_text: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end_of_text,
        eos_token=end_of_text,
        pad_token=end_of_text,
        clean_up_tokenization_spaces=False,
    )
