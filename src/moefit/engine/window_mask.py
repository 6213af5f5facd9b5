"""The mask of a layer as a model hands it to attention: said, instead of written out.

Owns the mask function that transformers calls by name, and what of its masks can be said so: causal
ones, and sliding windows. Knows nothing of requests: who attends cuts each one's keys out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from moefit.engine.segments import UnpackableError


class WindowMask(Tensor):
    """The mask of a layer, said instead of written out: causal, over `window` keys, or all.

    Models hand it on unread. What became of it on the way, a part of it say, has no window.
    """

    window: int | None

    @classmethod
    def of(cls, window: int | None, device: torch.device) -> "WindowMask":
        """A mask that says so."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(cls)
        mask.window = window
        return mask


def window_mask(
    *,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_sizes: Any,
) -> WindowMask:
    """What transformers calls to make a mask; see its `masking_utils.py`.

    Raises UnpackableError for a mask that is neither causal nor a sliding window.
    """
    if attention_mask is not None:
        raise UnpackableError("it has an attention mask of its own")
    if mask_function is causal_mask_function:
        return WindowMask.of(None, torch.device(device))
    if use_vmap or local_size is None or not _slides(mask_function, int(local_size)):
        raise UnpackableError("its attention mask is neither causal nor a sliding window")
    return WindowMask.of(int(local_size), torch.device(device))


def _slides(mask_function: Callable, window: int) -> bool:
    """Whether it is a sliding window, at positions around the multiples of its size."""
    at = torch.tensor(sorted({max(0, window * n + d) for n in range(4) for d in (-1, 0, 1)}))
    zero, sliding = torch.tensor(0), sliding_window_causal_mask_function(window)
    one, other = (
        mask(zero, zero, at[:, None], at[None]).expand(len(at), len(at))
        for mask in (mask_function, sliding)
    )
    return torch.equal(one, other)
