"""A sequence task made of any text: restore a clause from its content words.

The target is a clause (what stands between two punctuation marks) in lower case, if all its words
are among the most frequent ones; the source is what is left of it without function words. A model
copies and has to guess the rest, and Rouge-2, which counts pairs of neighbouring words, judges how
well. The vocabulary is small so that a small model learns it within minutes.
"""

import random
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_WORDS = """
a about after all also am an and any are as at be because been before being but by can could did do
does down for from had has have he her herself him himself his how i if in into is it its itself may
me might mine must my myself no nor not of off on one or our out over shall she should so some such
than that the thee their them then there these they this those thou though thy to too under up upon
us very was we were what when where which while who whom whose why will with would yet you your
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
LEAST_WORDS, MOST_WORDS, LEAST_CONTENT = 5, 12, 2
VOCABULARY = 1021  # words, and three special tokens
FILES, HELD_OUT = 48, 8  # at most so many files, of which every eighth is held out
_PUNCTUATION = re.compile(r"[^a-z' \n]+|\n\s*\n")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """A clause's content words, and the clause."""

    source: str
    target: str


def pairs(folder: Path, vocabulary: Collection[str], *, held_out: bool) -> list[Pair]:
    """Return the pairs of a folder's text files, in random order and without repetitions.

    Args:
        folder: With `*.txt`.
        vocabulary: Words that clauses may have.
        held_out: Those of every eighth file, or those of the others.
    """
    texts = (file.read_text(errors="ignore") for file in _files(folder, held_out=held_out))
    found = list(dict.fromkeys(pair for text in texts for pair in _of_text(text, vocabulary)))
    random.Random(0).shuffle(found)
    return found


def frequent_words(folder: Path) -> list[str]:
    """Return the most frequent words of the files that are not held out."""
    counts: Counter[str] = Counter()
    for file in _files(folder, held_out=False):
        counts.update(_WORD.findall(file.read_text(errors="ignore").lower()))
    return [word for word, _ in counts.most_common(VOCABULARY) if len(word) > 1 or word in "ai"]


def _files(folder: Path, *, held_out: bool) -> list[Path]:
    files = sorted(folder.glob("*.txt"))[::2][:FILES]
    return [file for at, file in enumerate(files) if (at % HELD_OUT == 0) == held_out]


def _of_text(text: str, vocabulary: Collection[str]) -> Iterator[Pair]:
    known = frozenset(vocabulary)
    for clause in _PUNCTUATION.split(text.lower()):
        words = clause.split()
        if LEAST_WORDS <= len(words) <= MOST_WORDS and known.issuperset(words):
            content = [word for word in words if word not in FUNCTION_WORDS]
            if LEAST_CONTENT <= len(content) < len(words):
                yield Pair(" ".join(content), " ".join(words))


def tokenizer_of(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words with padding 0 and end of sequence 1."""
    ids = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def rouge_2(predictions: Sequence[str], targets: Sequence[str]) -> list[float]:
    """Return each prediction's Rouge-2 F-measure."""
    scorer: Any = import_module("rouge_score.rouge_scorer").RougeScorer(["rouge2"])
    return [
        scorer.score(target, prediction)["rouge2"].fmeasure
        for prediction, target in zip(predictions, targets, strict=True)
    ]


def copied(test: Sequence[Pair]) -> float:
    """Return the Rouge-2 of sources as they are."""
    return fmean(rouge_2([one.source for one in test], [one.target for one in test]))
