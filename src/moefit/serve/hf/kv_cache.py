"""Keys and values with room for what comes: transformers' growing cache without its copies.

Owns where a layer's keys and values lie. `DynamicCache` makes new tensors at every token, so that
decoding reads and writes all of the past once more than attention does. Here they lie in buffers
that are longer than they are, and a step writes its own tokens only. Everything else is
transformers' own, and so are the values to the bit. Knows nothing of models.

Shapes: B sequences, H heads, N tokens so far, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

_MORE = 4  # a buffer is longer than it must be by a quarter
_LEAST = 32  # or by so many tokens


class ReservedLayer(DynamicLayer):
    """One layer's keys and values, views of the beginning of longer buffers.

    limit: how many tokens all sequences together may have; None: any number. Buffers are never
    longer than that for the sake of what may come.
    """

    def __init__(self, limit: Callable[[], int | None], old: DynamicLayer):
        super().__init__()
        for name, value in vars(old).items():
            setattr(self, name, value)
        self._limit = limit
        self._buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, H, new, D] each; gives all of [B, H, N, D], good until the next call."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, past_BHND: Tensor | None, new_BHND: Tensor) -> Tensor:
        past = 0 if past_BHND is None or not past_BHND.numel() else past_BHND.shape[-2]
        total = past + new_BHND.shape[-2]
        buffer = self._buffers.get(name)
        if buffer is None or not _begins(buffer, past_BHND, new_BHND, total):
            buffer = new_BHND.new_empty(
                *new_BHND.shape[:-2], self._capacity(total, len(new_BHND)), new_BHND.shape[-1]
            )
            if past:
                assert past_BHND is not None
                buffer[..., :past, :] = past_BHND
            self._buffers[name] = buffer
        buffer[..., past:total, :] = new_BHND
        return buffer[..., :total, :]

    def _capacity(self, total: int, sequences: int) -> int:
        wished, most = total + max(_LEAST, total // _MORE), self._limit()
        return wished if most is None else max(total, min(wished, most // sequences))

    def reset(self) -> None:
        """Forget everything."""
        self._buffers.clear()
        super().reset()


def _begins(buffer: Tensor, past_BHND: Tensor | None, new_BHND: Tensor, total: int) -> bool:
    """Whether the past still lies where the buffer begins, and the new fits behind it.

    Sequences may have been selected, repeated or put in another order since: then it does not.
    """
    if total > buffer.shape[-2] or new_BHND.dtype != buffer.dtype:
        return False
    if past_BHND is None or not past_BHND.numel():
        return buffer.shape[:2] == new_BHND.shape[:2] and buffer.shape[-1] == new_BHND.shape[-1]
    return (
        past_BHND.data_ptr() == buffer.data_ptr()
        and past_BHND.stride() == buffer.stride()
        and past_BHND.shape[:-2] == buffer.shape[:-2] == new_BHND.shape[:-2]
    )


def reserve_caches(model: nn.Module, limit: Callable[[], int | None]) -> RemovableHandle:
    """Let the layers of every cache that this model is given grow in place.

    Only those that are exactly `DynamicLayer`: others keep less than all of the past, or other
    things.
    """

    def most() -> int | None:  # a plain function: a copy of a cache must not copy its limit's owner
        return limit()

    def convert(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache = named.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, Cache) and not torch.is_grad_enabled():
            cache.layers[:] = [
                ReservedLayer(most, layer) if type(layer) is DynamicLayer else layer
                for layer in cache.layers
            ]

    return model.register_forward_pre_hook(convert, with_kwargs=True)
