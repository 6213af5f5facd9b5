"""Tokenise the text that a model is scored on, or pairs of sources and targets.

An encoder-decoder is scored on pairs: a file of lines, each a source and its target, separated by
a tab. For other models the default is the held-out part of the running Python's standard library.
Files are held out by name, so no model of moefit that was trained on it has seen them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefit.errors import DataError
from moefit.evaluate.perplexity import Text
from moefit.serve.windows import Windows, padded


def held_out_text(tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None) -> Text:
    """Return the held-out standard library.

    Args:
        tokenizer: The model's.
        context: Tokens per window.
        max_tokens: Most tokens to predict; None for all.
    """
    from moefit.train.config import DataConfig  # serving imports this module without training
    from moefit.train.data.split import split

    documents = split(DataConfig()).held_out()
    return _tokenize((document.text for document in documents), tokenizer, context, max_tokens)


def text_of_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    """Return a UTF-8 file; other arguments as for `held_out_text`.

    Raises:
        DataError: The file cannot be read.
    """
    return _tokenize([_read(path)], tokenizer, context, max_tokens)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example with "
            f"iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_text(
    path: Path | None, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    """Return the text of a file, or the held-out standard library if `path` is None."""
    if path is None:
        return held_out_text(tokenizer, context, max_tokens)
    return text_of_file(path, tokenizer, context, max_tokens)


def read_pairs(
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    start: int,
    context: int,
    max_tokens: int | None,
) -> Windows:
    """Return pairs of sources and targets, from the beginning of a file.

    Args:
        path: A file with a source, a tab and its target in each line.
        tokenizer: The model's.
        start: The decoder's start token, which each target gets.
        context: Longest source and longest target in tokens; what is longer is cut.
        max_tokens: Tokens of targets after which no more pairs are taken; None for all.

    Raises:
        DataError: There is no file, it cannot be read, or a line is no pair.
    """
    if path is None:
        raise DataError(
            "an encoder-decoder is scored on pairs: give a file as --text, with a source and its "
            "target in each line, separated by a tab"
        )
    sources, targets, tokens = list[Tensor](), list[Tensor](), 0
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if max_tokens is not None and tokens >= max_tokens:
            break
        source, tab, target = line.partition("\t")
        if not (tab and source.strip() and target.strip()):
            raise DataError(
                f"line {number} of {path} is not a source and its target, separated by a tab"
            )
        ids = tokenizer(text_target=target, verbose=False)["input_ids"]
        targets.append(torch.tensor([start, *ids][: context + 1]))
        sources.append(torch.tensor(tokenizer(source, verbose=False)["input_ids"][:context]))
        tokens += len(targets[-1]) - 1
    if not targets:
        raise DataError(f"{path} is empty; give a source and its target in each line")
    return Windows(padded(targets), padded(sources))


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
