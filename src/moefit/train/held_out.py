"""The loss on held-out text while a run is on its way.

Owns which windows are read, and how many at once. Knows nothing of when, or of who asks.

Shapes: B windows, L1 tokens a window plus the last target.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from transformers import PreTrainedModel

from moefit.train.batches import windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out tokens, read at most `limit` at a time in batches of training's size."""

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    limit: int
    bf16: bool

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, stop: Callable[[], bool]) -> float | None:
        """Mean cross-entropy in eval mode (the inference rule); None as soon as `stop` says so."""
        total, count = 0.0, 0
        model.eval()
        try:
            for window_BL1 in _stacked(self._windows(), self.batch_size):
                if stop():
                    return None
                ids_BL1 = torch.from_numpy(window_BL1.astype(np.int64)).to(model.device)
                total += self._summed(model, ids_BL1)
                count += ids_BL1.shape[0] * (ids_BL1.shape[1] - 1)
        finally:
            model.train()
        return total / count

    def _windows(self) -> Iterator[np.ndarray]:
        return windows(self.tokens, self.seq_len, self.limit)

    def _summed(self, model: PreTrainedModel, ids_BL1: torch.Tensor) -> float:
        with torch.autocast(ids_BL1.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(input_ids=ids_BL1[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids_BL1[:, 1:].flatten(), reduction="sum"
        )
        return loss.item()


def _stacked(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """`size` rows at once or fewer; a shorter row, as the last one may be, stands alone.

    >>> [x.shape for x in _stacked([np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(2)], 2)]
    [(2, 3), (1, 3), (1, 2)]
    """
    for _, alike in groupby(rows, key=len):
        while chunk := list(islice(alike, size)):
            yield np.stack(chunk)
