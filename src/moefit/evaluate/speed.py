"""Measure how fast a served model is, and how far from the bounds of its machine.

Decoding speed, prefill speed and latencies, next to the speeds that the measured bandwidths of
storage and memory would allow.
"""

import inspect
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefit.errors import ConfigError
from moefit.host import available_bytes
from moefit.serve.model import ServedModel

_READ = 256 << 20  # bytes of a file, to time storage by
_LEAST, _MOST = 384 << 20, 4 << 30  # bytes of memory, to time it by
_FEWEST = 16 << 20  # where next to nothing is free


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second, from storage with a cold page cache and from memory."""

    storage: float
    memory: float


def measure_bandwidth(folder: Path) -> Bandwidth:
    """Read part of the largest file past the page cache; multiply a matrix larger than caches."""
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = min(_READ, file.stat().st_size)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(8 << 20)
        began, done = time.perf_counter(), 0
        while done < size and (count := os.preadv(descriptor, [buffer], done)):
            done += count
        storage = done / (time.perf_counter() - began)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return Bandwidth(storage=storage, memory=_memory_bandwidth())


def bandwidth_apart(folder: Path) -> Bandwidth:
    """`measure_bandwidth` in a process of its own, with as many threads as this one has.

    The memory that it takes, 384 MiB or more, is then no part of a budget that this process keeps.
    """
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=torch.set_num_threads, initargs=threads
    ) as apart:
        return apart.submit(measure_bandwidth, folder).result()


def _memory_bandwidth() -> float:
    """A matrix times a vector; on one thread a sum reads a third less."""
    data_RC = torch.ones(_timed_bytes() >> 15, 1 << 13)
    ones_C = torch.ones(1 << 13)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        data_RC.mv(ones_C)
        best = max(best, data_RC.nbytes / (time.perf_counter() - began))
    return best


def _timed_bytes() -> int:
    """More than the caches hold, but at most half of what the machine and its control groups have
    free: a smaller matrix gives too high a figure, a larger one gets a process killed."""
    wanted = max(_LEAST, 2 * _cache_bytes(Path("/sys/devices/system/cpu")))
    return max(_FEWEST, min(wanted, _MOST, available_bytes() // 2))


def _cache_bytes(folder: Path) -> int:
    """The last-level caches of the processors that this process may run on, together.

    Some servers have more than a GiB of them, in many parts. 0 if the system does not say.
    """
    found: dict[tuple[str, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        with suppress(OSError, ValueError):
            parts = (folder / f"cpu{cpu}" / "cache").glob("index*")
            last = max(parts, key=lambda part: int((part / "level").read_text()))
            size = (last / "size").read_text().strip()
            shared = (last / "shared_cpu_list").read_text()
            found[last.name, shared] = int(size.removesuffix("K")) << 10
    return sum(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One measurement. Seconds a token are of decoding, one sequence.

    `storage_bound` and `memory_bound` are the least seconds a token could take, by the bytes that
    were moved; `ceiling` is tokens/s if the slower of the two were all there is.
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
    bytes_read_per_token: float
    storage_bound: float
    memory_bound: float
    peak_process_bytes: int

    @property
    def ceiling(self) -> float:
        """Tokens/s."""
        return 1 / max(self.storage_bound, self.memory_bound)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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
    """Prefill a prompt, then decode; the first `warm_up` tokens are not timed.

    seed: feed random tokens instead of the model's own choice. A model with random weights falls
    into repeating one token, whose experts are then always there; that would measure nothing.
    An encoder-decoder model encodes the prompt and decodes from its start token.
    Raises ConfigError if nothing would be timed.
    """
    if new_tokens < 1 or not len(prompt_T):
        raise ConfigError(
            f"{new_tokens} new tokens after {len(prompt_T)} of prompt: nothing to time; give at "
            "least one of each"
        )
    began = time.perf_counter()
    step = _prefilled(served, prompt_T, seed)
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
    touched = weights_per_token(served, report["hits"] + report["fetches"], new_tokens)
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
        bytes_read_per_token=read,
        storage_bound=read / bandwidth.storage,
        memory_bound=touched / bandwidth.memory,
        peak_process_bytes=report["peak_process_bytes"],
    )


def weights_per_token(served: ServedModel, expert_uses: int, tokens: int) -> float:
    """Bytes of weights that decoding one token reads from memory.

    All that is no expert, less the input embedding and, of an encoder-decoder, the encoder; and
    the experts in use, at their mean size.
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
    """Weights, encoded ones too."""
    return chain(module.parameters(), module.buffers())


def _prefilled(served: ServedModel, prompt_T: Tensor, seed: int | None) -> Any:
    """A function that decodes one more token each time it is called."""
    model = served.model
    generator = torch.Generator().manual_seed(seed or 0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def chosen(logits_1TV: Tensor) -> Tensor:
        if seed is None:
            return logits_1TV[:, -1:].argmax(-1)
        return torch.randint(0, vocabulary, (1, 1), generator=generator).to(model.device)

    prompt_1T = prompt_T[None].to(model.device)
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(input_ids=prompt_1T)
        fixed = {"encoder_outputs": encoded}
        start = model.generation_config.decoder_start_token_id or 0
        state = {"ids": torch.tensor([[start]], device=model.device), "cache": None}
    else:
        takes = "logits_to_keep" in inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if takes else {}
        output = model(input_ids=prompt_1T, use_cache=True, **last)
        fixed = {}
        state = {"ids": chosen(output.logits), "cache": output.past_key_values}

    def step() -> None:
        name = "decoder_input_ids" if fixed else "input_ids"
        output = model(
            **{name: state["ids"]}, past_key_values=state["cache"], use_cache=True, **fixed
        )
        state["ids"], state["cache"] = chosen(output.logits), output.past_key_values

    return step
