"""The text that a profile is made on: windows of equal length, whole ones only.

Owns how much of it is enough.

Shapes: B windows, T tokens.
"""

import hashlib

import torch
from torch import Tensor

from moefit.errors import DataError
from moefit.evaluate.perplexity import Text

FEWEST_WINDOWS = 4


def windows_of(text: Text) -> Tensor:
    """Windows [B, context + 1] spread over the text. Raises DataError if they are too few."""
    whole = (
        [
            window_T
            for batch_BT in text.batches()
            for window_T in batch_BT
            if len(window_T) == text.context + 1
        ]
        if len(text.ids_T) > 1
        else []
    )
    if len(whole) < FEWEST_WINDOWS:
        raise DataError(
            f"a text of {len(text.ids_T):,} tokens gives {len(whole)} windows of {text.context} "
            f"tokens, too few to calibrate on; give a text (and --tokens) of at least "
            f"{FEWEST_WINDOWS * text.context + 1:,} tokens, or a shorter --context"
        )
    return torch.stack(whole)


def digest_of(windows_BT: Tensor) -> str:
    """What tells one calibration text from another."""
    return hashlib.sha256(windows_BT.numpy().tobytes()).hexdigest()[:16]
