"""A KV cache with reserved capacity, and the limit on the tokens that it may hold.

transformers' `DynamicLayer` concatenates at every step; `ReservedLayer` writes in place instead,
and `Int8Layer` rounds what it writes to int8. `limit_context` raises an error for input beyond the
tokens that the memory estimate reserves.

Shapes: B sequences, H KV heads, N tokens, D head width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from moefit.cache_argument import forward_with_cache, given_cache, with_cache
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.previous_token import RouterLogits
from moefit.errors import ConfigError, UnsupportedModelError, in_brief
from moefit.quant.kv_int8 import Int8Rows, part_of, write_rows
from moefit.serve.hf.attention import INT8_NAME


@runtime_checkable
class TokenHolder(Protocol):
    """A cache shared by sequences of different lengths."""

    def tokens_held(self) -> int:
        """Return the tokens of all sequences, including those of the coming step."""
        ...


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def limit_context(
    model: nn.Module, limit: Callable[[], int | None], step_limit: Callable[[], int | None]
) -> RemovableHandle:
    """Make the model raise ConfigError for steps that would hold or compute too many tokens.

    Args:
        model: The model.
        limit: Returns the maximum number of tokens over all sequences, including the cached ones;
            None for no limit.
        step_limit: Returns the maximum number without the cached ones; None for no limit.
    """

    def check(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        maximum = limit()
        if maximum is not None and (needed := _tokens_after_step(inputs, named)) > maximum:
            raise ConfigError(
                f"this step would hold {needed:,} tokens, but the memory budget reserves for "
                f"{maximum:,}; load with context={needed} or more, or give shorter or fewer "
                "sequences"
            )
        longest, new = step_limit(), _tokens_of_step(inputs, named)
        if longest is not None and new > longest:
            raise ConfigError(
                f"this step would compute {new:,} tokens at once, but the memory budget reserves "
                f"for {longest:,}; load with step_tokens={new} or more, or compute them in parts"
            )

    return model.register_forward_pre_hook(check, with_kwargs=True)


def _tokens_of_step(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the new tokens of a step, over all sequences."""
    return max((one.shape[0] * one.shape[1] for one in _token_tensors(inputs, named)), default=0)


def _token_tensors(inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    given = [*inputs[:1], *(named.get(name) for name in _TOKENS)]
    return [one for one in given if isinstance(one, Tensor) and one.dim() >= 2]


def _tokens_after_step(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the tokens of all sequences after a step, of the encoder or decoder if longer."""
    cache: Any = given_cache(named)
    if isinstance(cache, TokenHolder):
        return cache.tokens_held()
    if not (tensors := _token_tensors(inputs, named)):
        return 0
    sequences = max(one.shape[0] for one in tensors)
    new = max(one.shape[1] for one in tensors)
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

    def room(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Append `tokens` places without writing to them.

        Returns:
            All keys and values, as `update` does; None if a buffer is full or there is none yet.
        """
        extended: list[Tensor] = []
        for name, past_BHND in (("keys", self.keys), ("values", self.values)):
            buffer = self._buffers.get(name)
            if buffer is None or past_BHND is None or not past_BHND.numel():
                return None
            total = past_BHND.shape[-2] + tokens
            if total > buffer.shape[-2] or not _is_start(past_BHND, buffer):
                return None
            extended.append(part_of(buffer, slice(None), slice(None), slice(total)))
        self.keys, self.values = extended
        return extended[0], extended[1]

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
    return _is_start(past_BHND, buffer) and buffer.shape[:-2] == new_BHND.shape[:-2]


def _is_start(past_BHND: Tensor, buffer: Tensor) -> bool:
    """Return whether the past is a view of the buffer's start, of all sequences and heads."""
    return (
        past_BHND.data_ptr() == buffer.data_ptr()
        and past_BHND.stride() == buffer.stride()
        and past_BHND.shape[:-2] == buffer.shape[:-2]
    )


class ReservedLogits(ReservedLayer, RouterLogits):
    """Router logits of one block, stored likewise."""


class Int8Layer(ReservedLayer):
    """Keys and values of one layer as `Int8Rows`, each rounded when it is appended.

    Keys outside a layer's sliding window are retained, and attention leaves them out.
    """

    def _append(self, name: str, past_BHND: Tensor | None, new_BHND: Tensor) -> Tensor:
        batch, heads, new, width = new_BHND.shape
        past = 0 if past_BHND is None or not past_BHND.numel() else past_BHND.shape[-2]
        buffer = self._buffers.get(name)
        if not isinstance(buffer, Int8Rows) or not _int8_fits(buffer, past_BHND, new_BHND):
            buffer = Int8Rows.zeros(batch, heads, self._capacity(past + new, batch), width)
            if past:
                assert isinstance(past_BHND, Int8Rows)
                buffer.codes()[:, :, :past] = past_BHND.codes()
                buffer.scales[:, :, :past] = past_BHND.scales
            self._buffers[name] = buffer
        places_N = torch.arange(past, past + new)
        for sequence, rows_HND in enumerate(new_BHND):
            write_rows(buffer.part(sequence), places_N, rows_HND)
        return buffer.part(slice(None), slice(None), slice(past + new))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change keys and values, and their scales alike."""
        if self.get_seq_length() > 0:
            for name in ("keys", "values"):
                rows = getattr(self, name)
                assert isinstance(rows, Int8Rows)
                setattr(self, name, rows.changed(change))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search."""
        self._change(lambda one: one.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change(lambda one: one.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self._change(lambda one: one[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; their number is negative, as in transformers."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # raises
        if tokens_to_remove < 0:
            self._change(lambda one: one[:, :, :tokens_to_remove])


def _int8_fits(buffer: Int8Rows, past_BHND: Tensor | None, new_BHND: Tensor) -> bool:
    """Return whether the past is still the start of the buffer and the new tokens fit."""
    past = 0 if past_BHND is None or not past_BHND.numel() else past_BHND.shape[-2]
    if past + new_BHND.shape[-2] > buffer.shape[-2] or buffer.shape[:2] != new_BHND.shape[:2]:
        return False
    if not past:
        return buffer.shape[-1] == new_BHND.shape[-1]
    assert past_BHND is not None
    return _is_start(past_BHND, buffer)


def reserve_caches(
    model: nn.Module, limit: Callable[[], int | None], *, int8: bool = False
) -> RemovableHandle:
    """Replace the layers of every cache passed to the model by `ReservedLayer` or `Int8Layer`.

    Only layers that are exactly `DynamicLayer` are replaced, and `RouterLogits`, which are never
    int8. Of layers with a sliding window, empty ones are, if all of a cache's are of transformers'
    plain class: by `Int8Layer`, or by `ReservedLayer` where memory for `limit` tokens in every
    layer is reserved anyway and masks contain the window (`INT8_NAME`). All keys are kept then.
    Other subclasses store other states.

    Args:
        model: The model.
        limit: See `ReservedLayer`.
        int8: Use `Int8Layer`, also for caches that the model would make itself.

    Returns:
        The hook.
    """

    def current_limit() -> int | None:  # a function, so that copying a cache does not copy `limit`
        return limit()

    as_own = partial(_as_int8 if int8 else _as_reserved, limit=current_limit)

    def convert(
        model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.is_grad_enabled():
            return None
        windows = int8 or (limit() is not None and _has_window_masks(model))
        given = given_cache(named)
        cache = given
        if cache is None and windows and (int8 or len(inputs) <= 1):
            cache = _new_cache(model, named, int8=int8)
        held = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if not isinstance(held, Cache):
            return None
        if windows and all(type(one) is DynamicSlidingWindowLayer for one in _sliding(held)):
            held.layers[:] = map(_without_window, held.layers)
        held.layers[:] = [as_own(layer) for layer in held.layers]
        if int8 and held.layer_class_to_replicate is DynamicLayer:  # for layers added later
            held.layer_class_to_replicate = cast(Any, partial(_empty_int8_layer, current_limit))
        return None if given is not None else (inputs, with_cache(named, cache, model))

    return model.register_forward_pre_hook(convert, with_kwargs=True)


def _new_cache(model: nn.Module, named: dict[str, Any], *, int8: bool) -> Cache | None:
    """Return the cache that a model would make itself, where its layers are to be replaced."""
    config = cast(Any, model.config)
    text = config.get_text_config(decoder=True)
    slides = int8 or "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if config.is_encoder_decoder or not slides:
        return None
    wanted = named.get("use_cache")
    wanted = getattr(text, "use_cache", True) if wanted is None else wanted
    return DynamicCache(config=config) if wanted else None


def _has_window_masks(model: nn.Module) -> bool:
    """Return whether masks for the model's attention contain their window."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == INT8_NAME


def _sliding(cache: Cache) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]


def _without_window(layer: Any) -> Any:
    empty = type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized
    return DynamicLayer() if empty else layer


def _as_reserved(layer: Any, limit: Callable[[], int | None]) -> Any:
    if type(layer) is RouterLogits:
        return ReservedLogits(limit, layer)
    return ReservedLayer(limit, layer) if type(layer) is DynamicLayer else layer


def _as_int8(layer: Any, limit: Callable[[], int | None]) -> Any:
    if type(layer) not in (DynamicLayer, ReservedLayer):
        return layer
    rounded = _empty_int8_layer(limit)
    if layer.get_seq_length():
        rounded.update(cast(Tensor, layer.keys), cast(Tensor, layer.values))
    return rounded


def _empty_int8_layer(limit: Callable[[], int | None]) -> Int8Layer:
    return Int8Layer(limit, DynamicLayer())


INT8_TOLERANCE = 0.2  # of the largest logit; int8 codes taken for values are off by more than 1


def int8_obstacle(config: Any) -> str | None:
    """Return why a model's configuration rules out an int8 cache, or None."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "it has an encoder, whose output is cached too"
    if getattr(text, "kv_lora_rank", None):
        return "it caches latent vectors that it expands (multi-head latent attention)"
    if isinstance(config, DsMoeConfig) and config.by_token_before:
        return "it caches router logits, and rounded ones would choose other experts"
    return None


def refuse_int8(name: str, reason: str) -> UnsupportedModelError:
    """Return the error for a model that cannot have an int8 cache."""
    return UnsupportedModelError(
        f"kv_cache int8 is not possible for {name}: {reason}; kv_cache model (the model's own "
        "dtype) works"
    )


@torch.inference_mode()
def check_int8_cache(model: PreTrainedModel, tokens: int) -> None:
    """Compare a short text's logits through an int8 cache with those without a cache.

    Args:
        model: The model, with the hook of `reserve_caches`.
        tokens: Largest number of tokens of the text.

    Raises:
        UnsupportedModelError: The model fails with an int8 cache, uses another kind of cache, or
            its logits differ by more than rounding.
    """
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    low, generator = min(3, vocabulary - 1), torch.Generator().manual_seed(0)
    ids_1T = torch.randint(low, vocabulary, (1, min(12, tokens)), generator=generator)
    reason = None
    for chunks in ((4, 3, 1, 1, 1, 1, 1), (7, 1, 1, 1, 1, 1)):  # some families read prompts whole
        try:
            reason = _int8_difference(model, ids_1T, chunks)
        except Exception as error:  # any error in a family's code
            raise refuse_int8(type(model).__name__, in_brief(error)) from error
        if reason is None:
            return
    raise refuse_int8(type(model).__name__, str(reason))


def _int8_difference(model: Any, ids_1T: Tensor, chunks: Sequence[int]) -> str | None:
    """Return what is wrong with logits through an int8 cache in these chunks; None if nothing."""
    own_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
    cache, rows, start = None, [], 0
    for number in chunks:
        part_1T = ids_1T[:, start : start + number]
        if part_1T.numel():
            output, cache = forward_with_cache(model, cache, input_ids=part_1T)
            rows.append(output.logits[0])
        start += number
    layers = cache.layers if isinstance(cache, Cache) else [cache]
    if odd := {type(one).__name__ for one in layers if _holds_floats(one)}:
        return f"its cache holds other states ({', '.join(sorted(odd))})"
    largest = own_TV.float().abs().max().clamp_min(1e-9)
    error = float((torch.cat(rows).float() - own_TV.float()).abs().max() / largest)
    return None if error <= INT8_TOLERANCE else f"its logits then differ by {error:.0%}"


def _holds_floats(layer: Any) -> bool:
    """Return whether a cache's layer holds keys, but not as int8."""
    return not isinstance(layer, Int8Layer) and isinstance(getattr(layer, "keys", None), Tensor)
