"""Prefixes of an engine in files: what they are files of, and which requests load and save them.

The fingerprint covers the checkpoint (its settings, and samples of experts), all dense weights as
they are in memory, the tokenizer's files, the layout of the KV cache, the software and its kernels:
files are only used where the same bits would be computed.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moefit
from moefit.engine.kv_pool import KvPool
from moefit.engine.prefix.disk import PrefixDisk, chunk_tokens
from moefit.engine.prefix.store import DiskStats, PrefixStore, file_size
from moefit.engine.prefix.tree import Prefix
from moefit.engine.request_state import RequestState
from moefit.engine.runners import Runner, VarlenRunner
from moefit.engine.scheduler import Scheduler
from moefit.errors import ConfigError
from moefit.quant.backend import backend_status
from moefit.quant.library import VERSION
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import fingerprint

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 5.0  # for saving, at the end
_SUMMED_WORDS = 1 << 20  # at a time: torch widens what it adds
_SAMPLE_BYTES = 4096  # of each dense tensor
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What loading and saving needs of an engine."""

    served: ServedModel
    runner: Runner
    scheduler: Scheduler
    requests: Mapping[str, RequestState]


class PrefixFiles:
    """Files of an engine's prefixes. All methods but `stats` are called in the engine's thread."""

    def __init__(
        self,
        store: PrefixStore,
        pool: KvPool,
        parts: EngineParts,
        between_steps: Callable[[Callable[[], Any]], Any],
    ):
        self._pool, self._parts = pool, parts
        self._chunk = chunk_tokens(pool.places.block, pool.bytes_per_place)
        nbytes = self._chunk * pool.bytes_per_place
        self._disk = PrefixDisk(store, self._chunk, nbytes, self, between_steps)

    @classmethod
    def open(
        cls,
        folder: Path,
        limit: int,
        parts: EngineParts,
        between_steps: Callable[[Callable[[], Any]], Any],
    ) -> "PrefixFiles | None":
        """Return the files of a model; None if its cache is not kept.

        Args:
            folder: Folder of the files.
            limit: Bytes of all files at most.
            parts: Of the engine.
            between_steps: See `Engine.between_steps`.

        Raises:
            CheckpointError: The folder cannot be used.
            ConfigError: Another server uses it, or the limit is less than a file.
        """
        if not isinstance(parts.runner, VarlenRunner):
            return None
        pool = parts.runner.cache.pool
        chunk = chunk_tokens(pool.places.block, pool.bytes_per_place)
        least = file_size(chunk * pool.bytes_per_place)
        if limit < least:
            raise ConfigError(
                f"--prefix-cache-disk {format_bytes(limit)} holds no file of {chunk} tokens, which "
                f"takes {least:,} bytes with this model; give at least that"
            )
        store = PrefixStore(folder, limit, fingerprint_of(parts.served, pool))
        _note_free_space(folder, limit - store.stats().bytes)
        return cls(store, pool, parts, between_steps)

    def start(self) -> None:
        """Start the thread that reads and writes."""
        self._disk.start()

    def load(self, state: RequestState) -> bool:
        """Begin to load what files have of the prompt of a request that was just opened.

        Returns:
            Whether there is anything; the scheduler is to hold the request until it is loaded.
        """
        if state.prefix is None or not state.prefix.durable or state.finished:
            return False
        return self._disk.load(state.name, state.prefix, state.cached_tokens)

    def save(self, state: RequestState) -> None:
        """Save a request that has ended."""
        if state.prefix is not None and state.prefix.durable and not state.failed:
            self._disk.save(replace(state.prefix, tokens=tuple(state.tokens)))

    def stats(self) -> DiskStats:
        """Return what the files hold, and totals."""
        return self._disk.stats()

    def settle(self, timeout: float) -> bool:
        """Wait, in any other thread, until everything is saved; return whether it is."""
        return self._disk.settle(timeout)

    def close(self) -> None:
        """Save what is waiting, and stop. Called from any other thread while the engine runs."""
        self._disk.close(_CLOSE_SECONDS)

    def copy_out(self, prefix: Prefix, start: int, stop: int) -> bytearray | None:
        """Return keys and values of a text's tokens; None if they are not there any more."""
        places = self._pool.places.locate(prefix, start, stop)
        return None if places is None else self._pool.copy_out(places)

    def copy_in(self, request: str, start: int, content: bytearray) -> bool:
        """Set keys and values of a request from a token on; False if it has ended."""
        if (state := self._parts.requests.get(request)) is None:
            return False
        places = self._pool.places
        with torch.inference_mode():
            self._pool.copy_in(places.start(request) + start, content)
        computed = start + self._chunk
        places.found(request, state.tokens, computed)
        self._parts.scheduler.skip(request, computed)
        state.cached_tokens = computed
        return True

    def loaded(self, request: str) -> None:
        """Let a request be computed."""
        if request in self._parts.requests:
            self._parts.scheduler.resume(request)


def _note_free_space(folder: Path, wanted: int) -> None:
    """Log if files may fill the disk."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        _LOG.warning(
            "prefixes in %s may grow by %s, and only %s are free on its disk; "
            "a smaller --prefix-cache-disk leaves room",
            folder, format_bytes(wanted), format_bytes(free),
        )  # fmt: skip


def fingerprint_of(served: ServedModel, pool: KvPool) -> str:
    """Return what keys and values in files depend on, apart from their text."""
    settings = served.placement_budget.settings
    skeleton = build_skeleton(served.folder, settings.dtype, settings.adapter)
    digest = hashlib.sha256(fingerprint(skeleton).encode())
    software = (moefit.__version__, torch.__version__, transformers.__version__)
    kernels = backend_status(served.model.device), VERSION
    known = (software, kernels, pool.layout(), str(served.model.config), settings.dense_precision)
    digest.update(repr(known).encode())
    for name, tensor in sorted(_dense_tensors(served.model)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_sum_of(tensor))
    if served.folder.is_dir():
        paths = {path for pattern in _TOKENIZER_FILES for path in served.folder.glob(pattern)}
        for path in sorted(paths):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, also those of encoded weights, which `state_dict` leaves out."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _sum_of(tensor: Tensor) -> bytes:
    """Return bytes that depend on all values of a tensor, and on the order of some."""
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = len(flat) // 4 * 4
    words = flat[:whole].view(torch.int32)
    total = sum(int(part.sum(dtype=torch.int64)) for part in words.split(_SUMMED_WORDS))
    middle = len(flat) // 2
    sample = torch.cat([flat[whole:], flat[middle : middle + _SAMPLE_BYTES]]).cpu()
    return repr((total, sample.numpy().tobytes())).encode()
