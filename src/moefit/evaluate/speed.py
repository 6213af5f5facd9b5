"""Measure how fast a served model is, and how far from the bounds of its machine.

Decoding speed, prefill speed and latencies, next to the speeds that the measured bandwidths of
storage and memory would allow.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moefit.cache_argument import forward_with_cache
from moefit.errors import ConfigError
from moefit.evaluate.bandwidth import Bandwidth
from moefit.serve.model import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed of one sequence.

    Attributes:
        mode: Exact, bounded or virtual.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Decoded tokens that were timed.
        prefill_tokens_per_second: Of the prompt.
        tokens_per_second: Of decoding.
        median_seconds: Per decoded token; so are `p95_seconds` and `worst_seconds`.
        hit_rate: Fraction of expert uses that found the expert resident.
        substituted_mass: Router weight that went to other experts than the router's choice.
        swaps: Swaps during decoding.
        prefetches: Experts read because they were predicted.
        prefetches_used: Those of them that the router then chose.
        bytes_read_per_token: Read from storage.
        storage_bound: Seconds per token for these bytes at storage bandwidth.
        memory_bound: Seconds per token for the weights used, at memory bandwidth.
        peak_process_bytes: Peak resident set of the process.
    """

    mode: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    tokens_per_second: float
    median_seconds: float
    p95_seconds: float
    worst_seconds: float
    hit_rate: float
    substituted_mass: float
    swaps: int
    prefetches: int
    prefetches_used: int
    bytes_read_per_token: float
    storage_bound: float
    memory_bound: float
    peak_process_bytes: int

    @property
    def ceiling(self) -> float:
        """Tokens/s that the slower of both bandwidths allows."""
        return 1 / max(self.storage_bound, self.memory_bound)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ceiling": self.ceiling}


@torch.inference_mode()
def measure_speed(
    served: ServedModel,
    bandwidth: Bandwidth,
    *,
    prompt_T: Tensor,
    new_tokens: int,
    warm_up: int = 8,
    seed: int | None = None,
) -> Speed:
    """Prefill a prompt and decode one sequence.

    Args:
        served: The model. An encoder-decoder encodes the prompt and decodes from its start token.
        bandwidth: Of the machine, for the bounds.
        prompt_T: The prompt.
        new_tokens: Decoded tokens to time.
        warm_up: Decoded tokens before these.
        seed: Decode random tokens instead of the model's own choice. Models with random weights
            tend to repeat one token, whose experts are then always resident.

    Raises:
        ConfigError: There are no tokens to time.
    """
    if new_tokens < 1 or not len(prompt_T):
        raise ConfigError(
            f"{new_tokens} new tokens after {len(prompt_T)} of prompt: nothing to time; give at "
            "least one of each"
        )
    began = time.perf_counter()
    step = _prefill(served, prompt_T, seed)
    prefill = time.perf_counter() - began
    for _ in range(warm_up):
        step()
    served.reset()
    read, seconds = served.report()["bytes_read"], []
    for _ in range(new_tokens):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    report = served.report()
    read = (report["bytes_read"] - read) / new_tokens
    weights = weights_per_token(served, report["hits"] + report["fetches"], new_tokens)
    ordered = sorted(seconds)
    return Speed(
        mode=report["mode"],
        prompt_tokens=len(prompt_T),
        new_tokens=new_tokens,
        prefill_tokens_per_second=len(prompt_T) / prefill,
        tokens_per_second=new_tokens / sum(seconds),
        median_seconds=statistics.median(seconds),
        p95_seconds=ordered[int(0.95 * (len(ordered) - 1))],
        worst_seconds=ordered[-1],
        hit_rate=report["hit_rate"],
        substituted_mass=report["substituted_mass"],
        swaps=report["swaps"],
        prefetches=report["prefetches"],
        prefetches_used=report["prefetches_used"],
        bytes_read_per_token=read,
        storage_bound=read / bandwidth.storage,
        memory_bound=weights / bandwidth.memory,
        peak_process_bytes=report["peak_process_bytes"],
    )


def weights_per_token(served: ServedModel, expert_uses: int, tokens: int) -> float:
    """Return the bytes of weights that decoding one token reads from memory.

    These are the dense weights without input embedding and encoder, and the experts used at their
    mean size.

    Args:
        served: The model.
        expert_uses: Experts used in all steps and layers.
        tokens: Decoded tokens.
    """
    model = served.model
    skipped = {id(p) for p in _tensors(model.get_input_embeddings())}
    head = model.get_output_embeddings()
    if head is not None:
        skipped -= {id(p) for p in _tensors(head)}  # tied: read as the head
    if model.config.is_encoder_decoder:
        skipped |= {id(p) for p in _tensors(model.get_encoder())}
    dense = sum(
        p.nbytes for p in {id(p): p for p in _tensors(model)}.values() if id(p) not in skipped
    )
    slots = [slot.nbytes for one in served.blocks.values() for slot in one.slots.values()]
    return dense + sum(slots) / len(slots) * expert_uses / tokens


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield all weights; quantised ones are buffers."""
    return chain(module.parameters(), module.buffers())


def _prefill(served: ServedModel, prompt_T: Tensor, seed: int | None) -> Callable[[], None]:
    """Process the prompt; return a function that decodes one token."""
    model = served.model
    generator = torch.Generator().manual_seed(seed or 0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def next_token(logits_1TV: Tensor) -> Tensor:
        if seed is None:
            return logits_1TV[:, -1:].argmax(-1)
        return torch.randint(0, vocabulary, (1, 1), generator=generator).to(model.device)

    prompt_1T = prompt_T[None].to(model.device)
    if model.config.is_encoder_decoder:
        name, encoded = "decoder_input_ids", model.get_encoder()(input_ids=prompt_1T)
        fixed = {"encoder_outputs": encoded}
        start = model.generation_config.decoder_start_token_id or 0
        ids, cache = torch.tensor([[start]], device=model.device), None
    else:
        name, fixed = "input_ids", {}
        has_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if has_keep else {}
        output, cache = forward_with_cache(model, None, input_ids=prompt_1T, **last)
        ids = next_token(output.logits)

    def step() -> None:
        nonlocal ids, cache
        output, cache = forward_with_cache(model, cache, **{name: ids}, **fixed)
        ids = next_token(output.logits)

    return step
