"""Split documents into training and held-out text.

The rule is one of three:

- sources: `data.held_out` is held out. Training uses `data.sources` without files that are also in
  `data.held_out`.
- name: whole documents are held out by a hash of their names, independently of other documents.
- tail: used where `name` leaves one side empty, as with a single file, or holds out all of a source
  that has a weight. The last
  `data.held_out_fraction` of each document is held out, cut at a line break.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moefit.errors import DataError
from moefit.train.data.corpus import Document, documents
from moefit.train.settings import DataConfig

Rule = Literal["sources", "name", "tail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A split corpus. Each call reads the sources again, so it need not fit in memory.

    `data.max_bytes` truncates the training text, possibly within a document. Held-out documents
    are then those read until there (`name`), the tails of the truncated text (`tail`), or held-out
    text of as many bytes (`sources`).
    """

    data: DataConfig
    rule: Rule

    def train(self) -> Iterator[Document]:
        """Yield the documents to train on."""
        return self._side(held_out=False)

    def held_out(self) -> Iterator[Document]:
        """Yield the documents to evaluate on."""
        return self._side(held_out=True)

    def _side(self, *, held_out: bool) -> Iterator[Document]:
        if self.rule == "sources":
            sources = self.data.held_out if held_out else self.data.paths
            excluding = () if held_out else self.data.held_out
            return _truncated(
                documents(sources, text_key=self.data.text_key, excluding=excluding),
                self.data.max_bytes,
            )
        both = self._by_name() if self.rule == "name" else self._by_tail()
        return (document for is_held_out, document in both if is_held_out == held_out)

    def _by_name(self) -> Iterator[tuple[bool, Document]]:
        remaining = self.data.max_bytes or math.inf
        for document in documents(self.data.paths, text_key=self.data.text_key):
            if is_held_out(document.name, self.data.held_out_fraction):
                yield True, document
                continue
            kept, size = _truncate(document, remaining)
            if kept.text:
                yield False, kept
            remaining -= size
            if remaining <= 0:
                return

    def _by_tail(self) -> Iterator[tuple[bool, Document]]:
        found = documents(self.data.paths, text_key=self.data.text_key)
        for document in _truncated(found, self.data.max_bytes):
            cut = _tail_start(document.text, self.data.held_out_fraction)
            for held_out, text in ((False, document.text[:cut]), (True, document.text[cut:])):
                if text:
                    yield held_out, replace(document, text=text)


def split(data: DataConfig) -> Split:
    """Choose the rule for a corpus and check that neither side is empty.

    Raises:
        DataError: There is too little text for both sides.
    """
    candidate = Split(data=data, rule="sources" if data.held_out else "name")
    missing = _missing_side(candidate)
    if missing is not None and not data.held_out:
        candidate = Split(data=data, rule="tail")
        missing = _missing_side(candidate)
    if missing is not None:
        raise DataError(
            f"{', '.join(data.paths)} contains too little text to split: nothing is left "
            f"to {missing}; give more text, or name other files with data.held_out"
        )
    return candidate


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether the hash of a name is in the lowest `fraction` of all hashes.

    A larger fraction adds documents and removes none.

    >>> is_held_out("stdlib/abc.py", 0.0), is_held_out("stdlib/abc.py", 1.0)
    (False, True)
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _missing_side(candidate: Split) -> str | None:
    if next(candidate.train(), None) is None:
        return "train on"
    if candidate.rule == "name" and any(_trains_nothing(one) for one in _drawn_sources(candidate)):
        return "draw from a source"
    if next(candidate.held_out(), None) is None:
        return "hold out"
    return None


def _drawn_sources(candidate: Split) -> Iterator[Split]:
    """Yield a split for each source with a weight above 0."""
    data = candidate.data
    for path, weight in zip(data.paths, data.weights or (), strict=False):
        if weight:
            alone = data.model_copy(update={"sources": (path,)})
            yield Split(data=alone, rule=candidate.rule)


def _trains_nothing(source: Split) -> bool:
    return next(source.train(), None) is None


def _truncated(found: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    remaining = max_bytes or math.inf
    for document in found:
        kept, size = _truncate(document, remaining)
        if kept.text:
            yield kept
        remaining -= size
        if remaining <= 0:
            return


def _truncate(document: Document, max_bytes: float) -> tuple[Document, int]:
    """Truncate a document to whole characters; return it and the bytes to subtract."""
    raw = document.text.encode("utf-8")
    if len(raw) <= max_bytes:
        return document, len(raw)
    text = raw[: int(max_bytes)].decode("utf-8", "ignore")
    # Bytes of a character that does not fit count too, so that nothing follows.
    return replace(document, text=text), int(max_bytes)


def _tail_start(text: str, fraction: float) -> int:
    """Return where the last `fraction` of a text starts, at a line break if one is near."""
    start = len(text) - math.ceil(len(text) * fraction)
    earliest = max(0, 2 * start - len(text))  # at most twice the fraction
    return text.rfind("\n", earliest, start) + 1 or start
