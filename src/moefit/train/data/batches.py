"""Tokens as batches, in an order that needs no state.

Owns which tokens a training step sees and in which windows evaluation reads. A batch follows
from (seed, step) alone, so a resumed run sees what an uninterrupted one would have. Knows
nothing of files or text.

Shapes: B sequences, L tokens a sequence, L1 = L + 1, W windows an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """The training batches of a corpus.

    Each epoch lays a grid of windows over the corpus, L tokens apart and L + 1 long (the last
    token is only a target), and visits every window once, in an order of its own. The grid
    starts elsewhere each epoch, so that the borders between windows move; for this one window
    is given up, except where there is only one. Epochs follow without a break within a batch.
    """

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert len(self.tokens) > self.seq_len > 0, "prepare() sees to this"
        assert self.batch_size > 0
        assert self.seed >= 0, "numpy's generators take no negative seed"

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch visits; the same for each, wherever its grid starts."""
        return max(1, len(self.tokens) // self.seq_len - 1)

    def epoch(self, step: int) -> float:
        """How many epochs are complete before `step`."""
        return step * self.batch_size / self.windows_per_epoch

    def batch(self, step: int) -> torch.Tensor:
        """The int64 ids_BL1 of `step`: without its last column the inputs, without its first the
        targets.
        """
        first = step * self.batch_size
        starts_B = [self._start(index) for index in range(first, first + self.batch_size)]
        ids_BL1 = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts_B])
        return torch.from_numpy(ids_BL1.astype(np.int64))

    def _start(self, index: int) -> int:
        """Where the window begins that is visited as number `index`, counted over all epochs."""
        epoch, place = divmod(index, self.windows_per_epoch)
        return int(self._starts(epoch)[place])

    def _starts(self, epoch: int) -> np.ndarray:
        spare = len(self.tokens) - 1 - self.windows_per_epoch * self.seq_len
        return _starts_W(
            self.windows_per_epoch, self.seq_len, min(spare, self.seq_len - 1), self.seed, epoch
        )


@lru_cache(maxsize=2)  # a batch can reach into the next epoch
def _starts_W(windows: int, stride: int, max_offset: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(max_offset, endpoint=True)
    starts_W = generator.permutation(windows) * stride + offset
    starts_W.flags.writeable = False  # shared by all who ask for this epoch
    return starts_W


def windows(tokens: np.ndarray, seq_len: int, limit: int | None = None) -> Iterator[np.ndarray]:
    """Evaluation windows of at most `seq_len` + 1 tokens, in order.

    Each token but the corpus's first is a target exactly once; the last window may be shorter.
    With a `limit` below that, as many whole windows as have at most so many targets, at least
    one, spread evenly over the corpus: its beginning alone may be unlike the rest.

    >>> [w.tolist() for w in windows(np.arange(6), 2)]
    [[0, 1, 2], [2, 3, 4], [4, 5]]
    >>> [w.tolist() for w in windows(np.arange(9), 2, limit=5)]
    [[2, 3, 4], [6, 7, 8]]
    """
    targets = len(tokens) - 1
    chosen = range(0, targets, seq_len)
    if limit is not None and limit < targets and targets >= seq_len:
        whole = targets // seq_len
        count = max(1, limit // seq_len)
        # Each from the middle of its share of the corpus.
        chosen = [(2 * i + 1) * whole // (2 * count) * seq_len for i in range(count)]
    for start in chosen:
        yield tokens[start : start + seq_len + 1]
