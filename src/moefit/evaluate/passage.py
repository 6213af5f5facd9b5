"""Tokenise the text that a model is scored on.

The default is the held-out part of the running Python's standard library. Files are held out by
name, so no model of moefit that was trained on the standard library has seen them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moefit.errors import DataError
from moefit.evaluate.perplexity import Text
from moefit.train.config import DataConfig
from moefit.train.data.split import split


def held_out_text(tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None) -> Text:
    """Return the held-out standard library.

    Args:
        tokenizer: The model's.
        context: Tokens per window.
        max_tokens: Most tokens to predict; None for all.
    """
    documents = split(DataConfig()).held_out()
    return _tokenize((document.text for document in documents), tokenizer, context, max_tokens)


def text_of_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    """Return a UTF-8 file; other arguments as for `held_out_text`.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return _tokenize([text], tokenizer, context, max_tokens)


def read_text(
    path: Path | None, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    """Return the text of a file, or the held-out standard library if `path` is None."""
    if path is None:
        return held_out_text(tokenizer, context, max_tokens)
    return text_of_file(path, tokenizer, context, max_tokens)


def _tokenize(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int | None,
) -> Text:
    """Concatenate documents, each followed by the end-of-text token if there is one.

    As in training, `<|endoftext|>` in a text is encoded as plain text.
    """
    ids: list[int] = []
    text_bytes = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        more = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        ids += [*more, *end]
        text_bytes += len(text.encode())
    return Text(
        ids_T=torch.tensor(ids, dtype=torch.int64),
        text_bytes=max(1, text_bytes),
        context=context,
        max_tokens=max_tokens,
    )
