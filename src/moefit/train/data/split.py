"""Divide the documents into those to train on and those held out.

Owns the three rules of division and the limit `data.max_bytes`. Knows nothing of files or tokens.

- sources: `data.held_out` is held out; `data.sources`, less any file that is also in
  `data.held_out`, trains.
- name: a document is held out by a hash of its name, whole, whatever else the corpus holds.
- tail: where that leaves one side empty (a single file, a few novels), the last
  `data.held_out_fraction` of every document is held out, cut at a line.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moefit.errors import DataError
from moefit.train.config import DataConfig
from moefit.train.data.corpus import Document, documents

Rule = Literal["sources", "name", "tail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Both sides of the corpus; each call reads anew, so that no side need fit in memory.

    `data.max_bytes` ends the training text, in the middle of a document if need be. Under the rule
    "name" the held-out documents are those met until then; under "tail" the tails are cut from
    the text up to there; under "sources" the held-out text ends after as many bytes.
    """

    data: DataConfig
    rule: Rule

    def train(self) -> Iterator[Document]:
        """The documents to train on."""
        return self._side(held_out=False)

    def held_out(self) -> Iterator[Document]:
        """The documents to evaluate on."""
        return self._side(held_out=True)

    def _side(self, *, held_out: bool) -> Iterator[Document]:
        if self.rule == "sources":
            return self._from_sources(held_out=held_out)
        pieces = self._by_name() if self.rule == "name" else self._by_tail()
        return (document for is_held_out, document in pieces if is_held_out == held_out)

    def _from_sources(self, *, held_out: bool) -> Iterator[Document]:
        sources = self.data.held_out if held_out else self.data.sources
        excluding = () if held_out else self.data.held_out
        found = documents(sources, text_key=self.data.text_key, excluding=excluding)
        return _clipped(found, self.data.max_bytes)

    def _by_name(self) -> Iterator[tuple[bool, Document]]:
        room = self.data.max_bytes or math.inf
        for document in documents(self.data.sources, text_key=self.data.text_key):
            if is_held_out(document.name, self.data.held_out_fraction):
                yield True, document
                continue
            clipped, size = _clip(document, room)
            if clipped.text:
                yield False, clipped
            room -= size
            if room <= 0:
                return

    def _by_tail(self) -> Iterator[tuple[bool, Document]]:
        found = documents(self.data.sources, text_key=self.data.text_key)
        for document in _clipped(found, self.data.max_bytes):
            cut = _tail_start(document.text, self.data.held_out_fraction)
            for held_out, text in ((False, document.text[:cut]), (True, document.text[cut:])):
                if text:
                    yield held_out, Document(name=document.name, text=text)


def split(data: DataConfig) -> Split:
    """Choose the rule by which `data` is divided; reads until both sides are known to hold text."""
    if data.held_out:
        return _with_both_sides(Split(data=data, rule="sources"))
    by_name = Split(data=data, rule="name")
    if _missing_side(by_name) is None:
        return by_name
    return _with_both_sides(Split(data=data, rule="tail"))


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the hash of `name` lies in the lowest `fraction` of all hashes.

    Raising the fraction therefore only adds documents.

    >>> is_held_out("stdlib/abc.py", 0.0), is_held_out("stdlib/abc.py", 1.0)
    (False, True)
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _with_both_sides(division: Split) -> Split:
    missing = _missing_side(division)
    if missing is not None:
        raise DataError(
            f"{', '.join(division.data.sources)} holds too little text to divide: nothing is left "
            f"to {missing}; give more text, or name other files with data.held_out"
        )
    return division


def _missing_side(division: Split) -> str | None:
    if next(division.train(), None) is None:
        return "train on"
    if next(division.held_out(), None) is None:
        return "hold out"
    return None


def _clipped(found: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    room = max_bytes or math.inf
    for document in found:
        clipped, size = _clip(document, room)
        if clipped.text:
            yield clipped
        room -= size
        if room <= 0:
            return


def _clip(document: Document, room: float) -> tuple[Document, int]:
    """The document cut to `room` bytes, between two characters, and what it takes of the room."""
    raw = document.text.encode("utf-8")
    if len(raw) <= room:
        return document, len(raw)
    text = raw[: int(room)].decode("utf-8", "ignore")
    # All the room counts as taken, though a character that straddles its end is left out.
    return Document(name=document.name, text=text), int(room)


def _tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of `text` begins: at a line if one begins near, else anywhere."""
    start = len(text) - math.ceil(len(text) * fraction)
    earliest = max(0, 2 * start - len(text))  # a tail of up to twice the fraction
    return text.rfind("\n", earliest, start) + 1 or start
