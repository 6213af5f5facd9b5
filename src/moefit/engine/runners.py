"""How the tokens of several requests go through the model.

Owns the two ways: packed, all in one forward pass over the pool of keys and values, and separate,
each request with a cache of its own, which works with every family. Knows nothing of schedules or
of how a token is chosen.

Shapes: B sequences, T tokens, N rows of logits that were asked for, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.engine.kv_pool import KvPool
from moefit.engine.varlen import Segment, VarlenCache, varlen_attention_enabled
from moefit.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInput:
    """Tokens of a request, behind `past` others. wants: of how many, the last ones, logits."""

    request: str
    tokens: Sequence[int]
    past: int
    wants: int


class Runner(Protocol):
    """Holds the keys and values of requests between steps."""

    name: str
    whole_prompts: bool
    model: PreTrainedModel

    def open(self, request: str, tokens: int) -> None:
        """Make room for a request that will be so many tokens long."""
        ...

    def close(self, request: str) -> None:
        """Forget a request."""
        ...

    def step(self, works: Sequence[RunnerInput]) -> Tensor:
        """The logits asked for, [N, V], in the order of the work."""
        ...


class VarlenRunner:
    """All of a step's tokens in one forward pass."""

    name = "packed"
    whole_prompts = False

    def __init__(self, model: PreTrainedModel, places: int):
        self.cache = VarlenCache(KvPool(places))
        self.model, self._device = model, model.device
        self._lengths: dict[str, int] = {}
        self._storages: set[int] = set()
        self._settled = False
        self._has_logits_to_keep = _takes(model, "logits_to_keep")

    def settle(self) -> None:
        """After steps that tried: give the model keys side by side if it computes with them."""
        self.cache.gathers = not self._storages <= self.cache.pool.storages()
        self._settled = True  # keys that are gathered lie elsewhere in every step

    def open(self, request: str, tokens: int) -> None:
        """Take its places."""
        self._lengths[request] = 0
        self.cache.pool.take(request, tokens)

    def close(self, request: str) -> None:
        """Give its places back, if it has any: its opening may have failed."""
        self._lengths.pop(request, None)
        self.cache.pool.give_back(request)

    def step(self, works: Sequence[RunnerInput]) -> Tensor:
        """The logits asked for, [N, V]."""
        extents = self.cache.pool.extents
        segments = [
            Segment(start=extents.start(one.request), past=one.past, new=len(one.tokens))
            for one in works
        ]
        held = sum(self._lengths.values()) + sum(
            one.past + len(one.tokens) - self._lengths[one.request] for one in works
        )
        plan = self.cache.begin(segments, held, self._device)
        ids = [token for one in works for token in one.tokens]
        at = [place for one in segments for place in range(one.past, one.past + one.new)]
        # One token of each request is a batch, so that the model knows that it is decoding.
        shape = (-1, 1) if len(ids) == len(works) else (1, -1)
        rows = _wanted(works)
        keep: dict[str, Any] = {}
        if self._has_logits_to_keep and shape == (1, -1) and len(rows) < len(ids):
            kept = rows or [0]  # heads of no rows at all are nobody's business to try
            keep["logits_to_keep"] = torch.tensor(kept, device=self._device)
        with varlen_attention_enabled(self.model):
            logits = self.model(
                input_ids=torch.tensor(ids, device=self._device).view(shape),
                position_ids=torch.tensor(at, device=self._device).view(shape),
                past_key_values=self.cache,
                use_cache=True,
                segments=plan,
                **keep,
            ).logits
        if not self._settled:
            self._storages |= plan.storages
        for one in works:
            self._lengths[one.request] = one.past + len(one.tokens)
        logits_NV = logits.flatten(0, 1)
        if keep:
            return logits_NV[: len(rows)]
        return logits_NV if len(rows) == len(ids) else logits_NV[rows]


def _wanted(works: Sequence[RunnerInput]) -> list[int]:
    """Rows of a step's tokens whose logits are asked for."""
    ends = accumulate(len(one.tokens) for one in works)
    return [
        row for one, end in zip(works, ends, strict=True) for row in range(end - one.wants, end)
    ]


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


class SeparateRunner:
    """Each request with its own cache, one forward pass after another.

    An encoder-decoder model encodes the prompt; its answer begins behind the start token.
    """

    name = "separate"

    def __init__(self, model: PreTrainedModel, *, whole_prompts: bool):
        self.model, self._device = model, model.device
        self.whole_prompts = whole_prompts or bool(model.config.is_encoder_decoder)
        self._caches: dict[str, Any] = {}
        self._encoded: dict[str, Any] = {}
        self._has_logits_to_keep = _takes(model, "logits_to_keep")
        self._start = _start_token(model) if model.config.is_encoder_decoder else None

    def open(self, request: str, tokens: int) -> None:
        """Begin without a cache; the model makes one."""
        del tokens
        self._caches[request] = None

    def close(self, request: str) -> None:
        """Free its cache."""
        self._caches.pop(request, None)
        self._encoded.pop(request, None)

    def step(self, works: Sequence[RunnerInput]) -> Tensor:
        """The logits asked for, [N, V]."""
        rows = [self._forward(one) for one in works]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _forward(self, work: RunnerInput) -> Tensor:
        ids_1T = torch.tensor([list(work.tokens)], device=self._device)
        inputs: dict[str, Any] = {"input_ids": ids_1T}
        if self._start is not None:
            if work.past == 0:
                self._encoded[work.request] = self.model.get_encoder()(input_ids=ids_1T)
                ids_1T = torch.tensor([[self._start]], device=self._device)
            encoded = self._encoded[work.request]
            inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids_1T}
        if self._has_logits_to_keep:
            inputs["logits_to_keep"] = max(1, work.wants)
        cache = self._caches[work.request]
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        self._caches[work.request] = output.past_key_values
        return output.logits[0, output.logits.shape[1] - work.wants :]


def _start_token(model: PreTrainedModel) -> int:
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise UnsupportedModelError(
        f"{type(model).__name__} does not say with which token a decoder begins "
        "(decoder_start_token_id); write it into its generation_config.json"
    )
