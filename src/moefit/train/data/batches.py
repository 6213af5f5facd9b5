"""Training batches and evaluation windows of a token stream.

A training batch depends only on seed and step, so a resumed run sees the same batches as an
uninterrupted one.

Shapes: B sequences, L tokens per sequence, L1 = L + 1, W windows per epoch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moefit.train.config import TrainConfig
from moefit.train.data.mixture import Mixture
from moefit.train.data.tokens import PreparedData


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """The training batches of a corpus.

    Each epoch divides the corpus into windows, L tokens apart and L + 1 long (the last token is
    only a target), and visits each window once in random order. The first window starts at a random
    offset in each epoch, which costs one window if there are several. Batches may span epochs.

    Attributes:
        tokens: The corpus, more than `seq_len` tokens.
        seq_len: L.
        batch_size: B.
        seed: Not negative.
    """

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert len(self.tokens) > self.seq_len > 0, "prepare() checks this"
        assert self.batch_size > 0
        assert self.seed >= 0, "numpy's generators reject negative seeds"

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows in each epoch."""
        return max(1, len(self.tokens) // self.seq_len - 1)

    def epoch(self, step: int) -> float:
        """Return the number of epochs before a step."""
        return step * self.batch_size / self.windows_per_epoch

    def batch(self, step: int) -> torch.Tensor:
        """Return the int64 token ids [B, L + 1] of a step: inputs and, shifted by one, targets."""
        first = step * self.batch_size
        return _stacked(self.sequence(index) for index in range(first, first + self.batch_size))

    def sequence(self, index: int) -> np.ndarray:
        """Return the ids [L + 1] of a sequence; `index` counts over all epochs."""
        start = self._start(index)
        return self.tokens[start : start + self.seq_len + 1]

    def _start(self, index: int) -> int:
        """Return the start of a window; `index` counts over all epochs."""
        epoch, position = divmod(index, self.windows_per_epoch)
        spare = len(self.tokens) - 1 - self.windows_per_epoch * self.seq_len
        max_offset = min(spare, self.seq_len - 1)
        starts_W = _starts_W(self.windows_per_epoch, self.seq_len, max_offset, self.seed, epoch)
        return int(starts_W[position])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchesByMachine:
    """Batches of which each machine's share is of its own text.

    Attributes:
        shares: Per machine.
    """

    shares: tuple[Batches, ...]

    def epoch(self, step: int) -> float:
        """Return the number of epochs before a step, of the machine with the least text."""
        return max(share.epoch(step) for share in self.shares)

    def batch(self, step: int) -> torch.Tensor:
        """Return the token ids [B, L + 1] of a step: the rows of machine 0, then those of 1, ..."""
        return torch.cat([share.batch(step) for share in self.shares])


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedBatches:
    """Batches whose sequences are drawn from several sources, in proportion to weights.

    Attributes:
        sources: The text of each; None for those of weight 0.
        mixture: Says which source a sequence is of.
        batch_size: B.
    """

    sources: tuple[Batches | None, ...]
    mixture: Mixture
    batch_size: int

    def epochs(self, step: int) -> list[float]:
        """Return the number of epochs of each source before a step."""
        counts = self.mixture.counts(step * self.batch_size)
        return [
            0.0 if source is None else count / source.windows_per_epoch
            for source, count in zip(self.sources, counts, strict=True)
        ]

    def epoch(self, step: int) -> float:
        """Return the number of epochs before a step, of the source that is repeated most."""
        return max(self.epochs(step))

    def batch(self, step: int) -> torch.Tensor:
        """Return the token ids [B, L + 1] of a step."""
        first = step * self.batch_size
        return _stacked(self._sequence(index) for index in range(first, first + self.batch_size))

    def _sequence(self, index: int) -> np.ndarray:
        number, before = self.mixture.drawn(index)
        source = self.sources[number]
        assert source is not None, "weight 0 is never drawn"
        return source.sequence(before)


def _stacked(rows: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(rows)).astype(np.int64))


def training_batches(
    config: TrainConfig, data: PreparedData
) -> Batches | BatchesByMachine | WeightedBatches:
    """Return the batches of a run."""
    if config.data.weights is not None:
        return _weighted(config, data, config.data.weights)
    files = data.shards or (data.train,)
    shares = tuple(
        Batches(
            tokens=file.open(),
            seq_len=config.seq_len,
            batch_size=config.batch_size // len(files),
            seed=config.seed,
        )
        for file in files
    )
    return shares[0] if len(shares) == 1 else BatchesByMachine(shares=shares)


def _weighted(
    config: TrainConfig, data: PreparedData, weights: tuple[float, ...]
) -> WeightedBatches:
    tokens, size = data.train.open(), config.batch_size
    starts = (0, *data.source_ends[:-1])
    sources = tuple(
        Batches(tokens=tokens[a:b], seq_len=config.seq_len, batch_size=size, seed=config.seed)
        if weight
        else None
        for a, b, weight in zip(starts, data.source_ends, weights, strict=True)
    )
    return WeightedBatches(sources=sources, mixture=Mixture(weights, config.seed), batch_size=size)


def use_of_sources(config: TrainConfig, data: PreparedData) -> list[dict[str, Any]]:
    """Return path, weight, tokens and epochs of each source of a run; [] without weights."""
    batches = training_batches(config, data)
    if not isinstance(batches, WeightedBatches):
        return []
    ends = data.source_ends
    tokens = [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]
    rows = zip(
        config.data.paths,
        batches.mixture.weights,
        tokens,
        batches.epochs(config.steps * config.accumulation),
        strict=True,
    )
    return [dict(zip(("path", "weight", "tokens", "epochs"), row, strict=True)) for row in rows]


def document_positions(ids_BL: torch.Tensor, end: int) -> torch.Tensor:
    """Return the positions [B, L] of tokens in their documents, which end with the token `end`.

    transformers' models take them as `position_ids` and mask attention between documents.

    >>> document_positions(torch.tensor([[5, 6, 0, 7, 0, 0, 8]]), end=0)
    tensor([[0, 1, 2, 0, 1, 0, 0]])
    """
    places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    is_first_BL = (ids_BL == end).roll(1, dims=1)
    is_first_BL[:, 0] = True
    starts_BL = torch.where(is_first_BL, places_L, 0).cummax(dim=1).values
    return places_L - starts_BL


def model_inputs(ids_BN: torch.Tensor, document_end: int | None) -> dict[str, torch.Tensor]:
    """Return the arguments of a forward pass; positions only if documents are kept apart."""
    if document_end is None:
        return {"input_ids": ids_BN}
    return {"input_ids": ids_BN, "position_ids": document_positions(ids_BN, document_end)}


@lru_cache(maxsize=256)  # a batch can span two epochs, of the text of each machine or source
def _starts_W(windows: int, stride: int, max_offset: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(max_offset, endpoint=True)
    starts_W = generator.permutation(windows) * stride + offset
    starts_W.flags.writeable = False  # the cache shares it
    return starts_W


def windows(tokens: np.ndarray, seq_len: int, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yield evaluation windows of at most `seq_len` + 1 tokens, in order.

    Each token except the first is a target exactly once; the last window may be shorter.

    Args:
        tokens: The corpus.
        seq_len: Most targets per window.
        limit: Most targets in total; windows are then spread evenly over the corpus. At least one
            full window is returned if there is one.

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
        # One from the middle of each of `count` equal parts of the corpus.
        chosen = [(2 * i + 1) * whole // (2 * count) * seq_len for i in range(count)]
    for start in chosen:
        yield tokens[start : start + seq_len + 1]
