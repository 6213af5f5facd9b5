"""A KV cache with reserved capacity, and the limit on the tokens that it may hold.

transformers' `DynamicLayer` concatenates at every step; `ReservedLayer` writes in place instead.
`limit_context` raises an error for input beyond the tokens that the memory estimate reserves.

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
    """A cache shared by sequences of different lengths."""

    def tokens_held(self) -> int:
        """Return the tokens of all sequences, including those of the coming step."""


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def limit_context(model: nn.Module, limit: Callable[[], int | None]) -> RemovableHandle:
    """Make the model raise ConfigError for steps that would hold too many tokens.

    Args:
        model: The model.
        limit: Returns the maximum number of tokens over all sequences, including the cached ones;
            None for no limit.

    Returns:
        The hook.
    """

    def check(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        maximum = limit()
        if maximum is None:
            return
        needed = _tokens_after_step(inputs, named)
        if needed > maximum:
            raise ConfigError(
                f"this step would hold {needed:,} tokens, but the memory budget reserves for "
                f"{maximum:,}; load with context={needed} or more, or give shorter or fewer "
                "sequences"
            )

    return model.register_forward_pre_hook(check, with_kwargs=True)


def _tokens_after_step(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the tokens of all sequences after a step, of the encoder or decoder if longer."""
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


# Extra capacity of a new buffer: a quarter, or this many tokens if that is more.
_EXTRA_DIVISOR = 4
_MIN_EXTRA_TOKENS = 32


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer, stored as views of the start of longer buffers.

    Args:
        limit: Returns the maximum number of tokens over all sequences; None for no limit. Buffers
            get no extra capacity beyond it.
        old: The layer to replace; its state is taken over.
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
        """Append keys and values [B, H, new, D].

        Returns:
            All keys and values [B, H, N, D], valid until the next call.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, past_BHND: Tensor | None, new_BHND: Tensor) -> Tensor:
        past = 0 if past_BHND is None or not past_BHND.numel() else past_BHND.shape[-2]
        total = past + new_BHND.shape[-2]
        buffer = self._buffers.get(name)
        if buffer is None or not _can_append(buffer, past_BHND, new_BHND, total):
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
        wanted = total + max(_MIN_EXTRA_TOKENS, total // _EXTRA_DIVISOR)
        maximum = self._limit()
        return wanted if maximum is None else max(total, min(wanted, maximum // sequences))

    def reset(self) -> None:
        """Remove all keys and values."""
        self._buffers.clear()
        super().reset()


def _can_append(buffer: Tensor, past_BHND: Tensor | None, new_BHND: Tensor, total: int) -> bool:
    """Return whether the past is still a view of the buffer's start and the new tokens fit.

    It is not after sequences were selected, repeated or reordered.
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
    """Replace the layers of every cache passed to the model by `ReservedLayer`.

    Only layers that are exactly `DynamicLayer` are replaced; subclasses store other states.

    Args:
        model: The model.
        limit: See `ReservedLayer`.

    Returns:
        The hook.
    """

    def current_limit() -> int | None:  # a function, so that copying a cache does not copy `limit`
        return limit()

    def convert(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache = named.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, Cache) and not torch.is_grad_enabled():
            cache.layers[:] = [
                ReservedLayer(current_limit, layer) if type(layer) is DynamicLayer else layer
                for layer in cache.layers
            ]

    return model.register_forward_pre_hook(convert, with_kwargs=True)
