"""The text that a model is scored on, as tokens.

Owns the default: the held-out part of the running Python's standard library, which is held out
by file name, so that it is the same files on every machine and none that a model trained on the
standard library has seen.
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
    """The held-out standard library."""
    documents = split(DataConfig()).held_out()
    return _text((document.text for document in documents), tokenizer, context, max_tokens)


def text_of_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    """One UTF-8 file. Raises DataError if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return _text([text], tokenizer, context, max_tokens)


def _text(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_tokens: int | None,
) -> Text:
    """Documents one after the other, each ended by the end-of-text token, as in training.

    As there, `<|endoftext|>` in a text is read as any other text. A tokenizer without such a
    token leaves the documents unseparated.
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
