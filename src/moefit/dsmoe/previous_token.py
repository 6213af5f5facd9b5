"""Route each token by what the router makes of the token before it.

With `pregated: previous_token` the logits by which a block routes a token are those of the block's
router for the token before, so that the experts of all blocks are known before a step begins (as
in Edge0, arXiv 2609.18063). The first token of a text has none before it and is routed by its own
logits, as in other models. So is the first token after padding, and a document's first where
documents are kept apart.

With `pregated: previous_token_and_embedding` each router also has weights for the token's own
embedding, which is known before a step too. What they make of it is added to these logits.

The logits of past tokens are kept in the KV cache, in a layer per block behind those of keys and
values, so that everything that changes a cache (crop, reorder, repeat) changes them too.

Shapes: B sequences, T tokens of the pass, N tokens with the cached ones, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moefit.errors import ConfigError, UnsupportedModelError
from moefit.moe.routing import at_least_float32


@runtime_checkable
class LogitsOfRequests(Protocol):
    """A cache shared by several sequences, which keeps the logits itself."""

    def logits_before(self, block: int, logits_BTE: Tensor) -> Tensor:
        """Keep the logits of a pass, and return those of the token before each.

        Args:
            block: Index of the block.
            logits_BTE: Of the tokens of the pass, in their order.

        Returns:
            Logits [B, T, E]; those of a sequence's first token are arbitrary.
        """
        ...

    def last_logits(self, block: int) -> Tensor | None:
        """Return the logits [B, E] by which the step that begins routes one token per sequence.

        Args:
            block: Index of the block.

        Returns:
            None if it has other numbers of tokens.
        """
        ...


class RouterLogits(DynamicLayer):
    """A layer of a cache that holds the router logits of a block: [B, 1, N, E] as keys."""

    def append(self, logits_BTE: Tensor) -> Tensor:
        """Append the logits of a pass, and return those of all tokens [B, N, E]."""
        keys_B1TE = logits_BTE[:, None]
        all_B1NE, _ = self.update(keys_B1TE, keys_B1TE[..., :0])
        return all_B1NE[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class PreviousToken:
    """Which tokens of a pass have one before them, and where its logits are.

    Attributes:
        follows_BT: False for tokens that are routed by their own logits; [1, T] if all sequences
            are alike.
        requests: A KV cache that several sequences share; None for another.
        layers: Layers for logits of another KV cache; empty in a pass over whole sequences.
        embedding_BTD: Normed embeddings of the tokens of the pass.
    """

    follows_BT: Tensor
    requests: LogitsOfRequests | None
    layers: Sequence[RouterLogits]
    embedding_BTD: Tensor

    @classmethod
    def of(
        cls,
        cache: Cache | None,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        embedding_BTD: Tensor,
        blocks: int,
    ) -> "PreviousToken":
        """Return what a pass needs; adds layers for logits to a new cache.

        Args:
            cache: Of the tokens before; None in a pass over whole sequences.
            position_ids: [B, T] or [1, T].
            attention_mask: [B, N], 0 for padding; ignored if of another form.
            embedding_BTD: Normed embeddings of the tokens.
            blocks: Number of blocks.

        Raises:
            UnsupportedModelError: The cache cannot hold logits.
            ConfigError: It holds keys and values of tokens without their logits.
        """
        follows_BT = position_ids > 0
        if attention_mask is not None and attention_mask.ndim == 2:
            before_BN = F.pad(attention_mask, (1, 0))[:, :-1].bool()
            follows_BT = follows_BT & before_BN[:, -follows_BT.shape[1] :]
        if isinstance(cache, LogitsOfRequests):
            return cls(follows_BT, cache, (), embedding_BTD)
        layers = () if cache is None else _layers_for_logits(cache, blocks)
        if not layers or not layers[0].get_seq_length():
            follows_BT[:, 0] = False
        return cls(follows_BT, None, layers, embedding_BTD)

    def of_block(self, block: int) -> "Shift":
        """Return by which logits a block routes, given its router's own."""
        return Shift(self, block)

    def shifted(self, block: int, logits_BTE: Tensor) -> Tensor:
        """Keep a block's logits of the tokens of the pass, and return those before each."""
        if self.requests is not None:
            before_BTE = self.requests.logits_before(block, logits_BTE)
        elif self.layers:
            all_BNE = self.layers[block].append(logits_BTE)
            before_BTE = _before_last(all_BNE, logits_BTE.shape[1])
        else:
            before_BTE = _before_last(logits_BTE, logits_BTE.shape[1])
        follows_BT1 = self.follows_BT[..., None].to(logits_BTE.device)  # layers may be on several
        return torch.where(follows_BT1, before_BTE, logits_BTE)


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """From the logits [B, T, E] that a router makes of tokens to those of the tokens before.

    Attributes:
        previous: Of the pass.
        block: Index of the router's block.
    """

    previous: PreviousToken
    block: int

    def __call__(self, logits_BTE: Tensor) -> Tensor:
        """Return the logits of the token before each, or its own of a first token."""
        return self.previous.shifted(self.block, logits_BTE)

    @property
    def embedding_BTD(self) -> Tensor:
        """Return the normed embeddings of the tokens."""
        return self.previous.embedding_BTD


def normed_embedding(x_TD: Tensor, eps: float) -> Tensor:
    """Return embeddings [.., D] divided by their root mean square, in float32."""
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        x_TD = at_least_float32(x_TD)
        return F.rms_norm(x_TD, x_TD.shape[-1:], eps=eps)


def _before_last(all_BNE: Tensor, last: int) -> Tensor:
    """Return the logits before each of the last tokens; those before the first are arbitrary."""
    start = all_BNE.shape[1] - last
    if start:
        return all_BNE[:, start - 1 : -1]  # a view: copying all of a long text would take longer
    return all_BNE.roll(1, dims=1)


def logits_of_last(cache: Any, block: int, blocks: int) -> Tensor | None:
    """Return the logits [B, E] by which a block will route the token after the cached ones.

    Args:
        cache: The KV cache before a step of one token per sequence.
        block: Index of the block.
        blocks: Number of blocks.

    Returns:
        None if there are none.
    """
    if isinstance(cache, LogitsOfRequests):
        return cache.last_logits(block)
    layers = getattr(cache, "layers", ())
    layer = layers[blocks + block] if len(layers) > blocks + block else None
    if not isinstance(layer, RouterLogits) or not layer.get_seq_length():
        return None
    assert layer.keys is not None
    return layer.keys[:, 0, -1]


def _layers_for_logits(cache: Cache, blocks: int) -> Sequence[RouterLogits]:
    """Return the layers of a cache that hold logits; adds them to one that has none."""
    if not isinstance(cache, DynamicCache):
        raise UnsupportedModelError(
            "pregated='previous_token' keeps the router logits of past tokens in the KV cache, and "
            f"a {type(cache).__name__} has no place for them; use a DynamicCache, which generate "
            "makes by default"
        )
    past = int(cache.get_seq_length())
    held = [one for one in cache.layers if isinstance(one, RouterLogits)]
    if not held:
        while len(cache.layers) < blocks:
            cache.layers.append(DynamicLayer())
        held = [RouterLogits() for _ in range(blocks)]
        cache.layers.extend(held)
    if (known := held[0].get_seq_length()) != past:
        raise ConfigError(
            f"the KV cache holds keys and values of {past} tokens and router logits of {known}, "
            "but pregated='previous_token' routes the next token by those of the last; give a "
            "cache that this model has filled"
        )
    return held
