"""Run the tokens of a step through the model.

`VarlenRunner` computes all requests in one forward pass over the KV pool. `SeparateRunner` computes
each request with its own cache, which works with every family.

Shapes: B sequences, T tokens, N rows of requested logits, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.cache_argument import cache_name, forward_with_cache
from moefit.engine.kv_pool import KvPool
from moefit.engine.prefix.cache import PrefixCache
from moefit.engine.prefix.tree import Prefix
from moefit.engine.varlen import Segment, VarlenCache, varlen_attention_enabled
from moefit.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInput:
    """Tokens of one request in a step.

    Attributes:
        request: Request id.
        tokens: Token ids.
        past: Tokens of this request computed before.
        num_logits: Return logits of this many tokens, the last ones.
    """

    request: str
    tokens: Sequence[int]
    past: int
    num_logits: int


class Runner(Protocol):
    """Holds the KV cache of running requests and computes steps.

    Attributes:
        name: As in `EngineStats`.
        packs: Whether the tokens of a step share a forward pass, and those of a request that were
            computed last may be replaced by others.
        whole_prompts: Whether prompts are computed in one step each.
        model: The model.
    """

    name: str
    packs: bool
    whole_prompts: bool
    model: PreTrainedModel

    @property
    def prefixes(self) -> PrefixCache | None:
        """Keys and values that requests may reuse; None if each has a cache of its own."""
        ...

    def open(self, request: str, tokens: int, prefix: Prefix | None = None) -> int:
        """Reserve KV cache for a request.

        Args:
            request: Request id.
            tokens: Tokens of prompt and completion.
            prefix: The prompt, if keys and values of other requests may be reused for it.

        Returns:
            The number of tokens at the start of the prompt that are in the KV cache already.
        """
        ...

    def join(self, request: str, prefix: Prefix) -> int:
        """Return what `open` would, after others have computed more of the same prompt."""
        ...

    def extend(self, request: str, tokens: Sequence[int], computed: int) -> None:
        """Let other requests reuse the first `computed` of a request's tokens."""
        ...

    def close(self, request: str, *, keep: bool = True) -> None:
        """Free a request's KV cache; `keep` as for `PrefixCache.close`."""
        ...

    def step(self, inputs: Sequence[RunnerInput]) -> Tensor:
        """Return the requested logits [N, V], in the order of the inputs."""
        ...


class VarlenRunner:
    """Compute all tokens of a step in one forward pass, without padding."""

    name = "packed"
    packs = True
    whole_prompts = False

    def __init__(self, model: PreTrainedModel, places: int, *, int8: bool = False):
        self.cache = VarlenCache(KvPool(places, int8=int8))
        self.model, self._device = model, model.device
        self._lengths: dict[str, int] = {}
        self._storages: set[int] = set()
        self._settled = False
        self._has_logits_to_keep = _accepts(model, "logits_to_keep")
        self._cache = {cache_name(model): self.cache}

    @property
    def prefixes(self) -> PrefixCache | None:
        """Keys and values that requests may reuse."""
        return self.cache.pool.places

    def settle(self) -> None:
        """Set after trial steps whether the model needs gathered keys and values."""
        self.cache.gather = not self._storages <= self.cache.pool.storages()
        self._settled = True  # gathered keys have new storage in every step

    def open(self, request: str, tokens: int, prefix: Prefix | None = None) -> int:
        """Reserve KV cache for a request, and return how much of its prompt is there."""
        cached = self.cache.pool.open(request, tokens, prefix)
        self._lengths[request] = cached
        return cached

    def resize(self, places: int) -> None:
        """Change the tokens that the KV cache holds; see `KvPool.resize`."""
        with torch.inference_mode():
            self.cache.pool.resize(places)

    def join(self, request: str, prefix: Prefix) -> int:
        """Copy what others have computed of a prompt; return how much of it is there."""
        self._lengths[request] = cached = self.cache.pool.join(request, prefix)
        return cached

    def extend(self, request: str, tokens: Sequence[int], computed: int) -> None:
        """Let other requests reuse the first `computed` of a request's tokens."""
        self.cache.pool.places.extend(request, tokens, computed)

    def close(self, request: str, *, keep: bool = True) -> None:
        """Free a request's KV cache, if any: `open` may have failed."""
        self._lengths.pop(request, None)
        self.cache.pool.places.close(request, keep=keep)

    def step(self, inputs: Sequence[RunnerInput]) -> Tensor:
        """Return the requested logits [N, V]."""
        places = self.cache.pool.places
        segments = [
            Segment(start=places.start(one.request), past=one.past, new=len(one.tokens))
            for one in inputs
        ]
        held = sum(self._lengths.values()) + sum(
            one.past + len(one.tokens) - self._lengths[one.request] for one in inputs
        )
        plan = self.cache.begin(segments, held, self._device)
        ids = [token for one in inputs for token in one.tokens]
        positions = [
            position
            for segment in segments
            for position in range(segment.past, segment.past + segment.new)
        ]
        # With one token per request, use a batch, so that the model takes its decoding path.
        shape = (-1, 1) if len(ids) == len(inputs) else (1, -1)
        rows = _logit_rows(inputs)
        extra: dict[str, Any] = {}
        if self._has_logits_to_keep and shape == (1, -1) and len(rows) < len(ids):
            kept = rows or [0]  # a language-model head may not support zero rows
            extra["logits_to_keep"] = torch.tensor(kept, device=self._device)
        with varlen_attention_enabled(self.model):
            logits = self.model(
                input_ids=torch.tensor(ids, device=self._device).view(shape),
                position_ids=torch.tensor(positions, device=self._device).view(shape),
                **self._cache,
                use_cache=True,
                segments=plan,
                **extra,
            ).logits
        if not self._settled:
            self._storages |= plan.storages
        for one in inputs:
            self._lengths[one.request] = one.past + len(one.tokens)
        logits_NV = logits.flatten(0, 1)
        if extra:
            return logits_NV[: len(rows)]
        return logits_NV if len(rows) == len(ids) else logits_NV[rows]


def _logit_rows(inputs: Sequence[RunnerInput]) -> list[int]:
    """Return the indices of the step's tokens whose logits are requested."""
    ends = accumulate(len(one.tokens) for one in inputs)
    return [
        row
        for one, end in zip(inputs, ends, strict=True)
        for row in range(end - one.num_logits, end)
    ]


def _accepts(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


class SeparateRunner:
    """Compute requests one after another, each with its own cache.

    For an encoder-decoder model the prompt is encoded, and generation begins at the decoder's start
    token.
    """

    name = "separate"
    packs = False

    def __init__(self, model: PreTrainedModel, *, whole_prompts: bool):
        self.model, self._device = model, model.device
        self.whole_prompts = whole_prompts or bool(model.config.is_encoder_decoder)
        self._caches: dict[str, Any] = {}
        self._encoded: dict[str, Any] = {}
        self._has_logits_to_keep = _accepts(model, "logits_to_keep")
        self._start = start_token(model) if model.config.is_encoder_decoder else None

    @property
    def prefixes(self) -> PrefixCache | None:
        """None: each request has a cache of its own."""
        return None

    def open(self, request: str, tokens: int, prefix: Prefix | None = None) -> int:
        """Register a request; the model creates its cache in the first step."""
        del tokens, prefix
        self._caches[request] = None
        return 0

    def join(self, request: str, prefix: Prefix) -> int:
        """Return 0: a request's cache is its own."""
        del request, prefix
        return 0

    def extend(self, request: str, tokens: Sequence[int], computed: int) -> None:
        """Do nothing: a request's cache is its own."""

    def close(self, request: str, *, keep: bool = True) -> None:
        """Free a request's cache."""
        del keep
        self._caches.pop(request, None)
        self._encoded.pop(request, None)

    def step(self, inputs: Sequence[RunnerInput]) -> Tensor:
        """Return the requested logits [N, V]."""
        rows = [self._forward(one) for one in inputs]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _forward(self, one: RunnerInput) -> Tensor:
        ids_1T = torch.tensor([list(one.tokens)], device=self._device)
        inputs: dict[str, Any] = {"input_ids": ids_1T}
        if self._start is not None:
            if one.past == 0:
                self._encoded[one.request] = self.model.get_encoder()(input_ids=ids_1T)
                ids_1T = torch.tensor([[self._start]], device=self._device)
            encoded = self._encoded[one.request]
            inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids_1T}
        if self._has_logits_to_keep:
            inputs["logits_to_keep"] = max(1, one.num_logits)
        cache = self._caches[one.request]
        output, self._caches[one.request] = forward_with_cache(self.model, cache, **inputs)
        return output.logits[0, output.logits.shape[1] - one.num_logits :]


def start_token(model: PreTrainedModel) -> int:
    """Return the token that an encoder-decoder's output begins with."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise UnsupportedModelError(
        f"{type(model).__name__} has no decoder_start_token_id; add it to the "
        "checkpoint's generation_config.json"
    )
