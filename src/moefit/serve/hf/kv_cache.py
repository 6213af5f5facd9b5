"""A KV cache with reserved capacity, and the limit on the tokens that it may hold.

transformers' growing cache concatenates at every step; `ReservedLayer` writes in place instead.
`limit_context` refuses input beyond the tokens that the memory estimate reserved.

Shapes: B sequences, H KV heads, N tokens, D head width.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from moefit.errors import ConfigError


@runtime_checkable
class TokenHolder(Protocol):
    """A cache that several sequences of different lengths share, and that can count."""

    def tokens_held(self) -> int:
        """Tokens of all sequences, those of the step that is about to be made included."""
        ...


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def limit_context(model: nn.Module, limit: Callable[[], int | None]) -> RemovableHandle:
    """Refuse steps whose sequences would hold more than `limit()` tokens together; None: no limit.

    The step raises ConfigError. Tokens of all sequences count, those in the cache too.
    """

    def check(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        most = limit()
        if most is None:
            return
        wanted = _held(inputs, named)
        if wanted > most:
            raise ConfigError(
                f"this step would hold {wanted:,} tokens, but the memory budget reserves for "
                f"{most:,}; load with context={wanted} or more, or give shorter or fewer sequences"
            )

    return model.register_forward_pre_hook(check, with_kwargs=True)


def _held(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Tokens of the longer side of the step, its past included, over all sequences."""
    if isinstance(shared := named.get("past_key_values"), TokenHolder):
        return shared.tokens_held()
    given = [*inputs[:1], *(named.get(name) for name in _TOKENS)]
    tensors = [one for one in given if isinstance(one, Tensor) and one.dim() >= 2]
    if not tensors:
        return 0
    sequences = max(one.shape[0] for one in tensors)
    new = max(one.shape[1] for one in tensors)
    cache: Any = named.get("past_key_values")
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return sequences * (int(past) + new)


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
