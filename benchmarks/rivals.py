"""Measure other systems, each in a process of its own; serving_speed.py starts them.

    python benchmarks/rivals.py llama.cpp|llama.cpp-repacked|accelerate < WORK.json

Reads a `Work` as JSON and prints one JSON line with the results of moefit.evaluate.speed. Imports
only what the rival needs, since torch would take memory from llama.cpp under a limit.
`peak_process_bytes` includes mapped pages of the model file, which the system may reclaim;
`anonymous_bytes` does not. Bytes read are the system's count for this process, including mapped
files.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESERVE = 700 << 20  # bytes for accelerate's workspace
Feed = Callable[[list[int]], None]
"""Processes tokens after all previous ones; returns when the last one's logits are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Model files, tokens and bandwidths.

    The tokens after the prompt are given; the first `warm_up` are not timed. `storage` and
    `bandwidth` are bytes per second from storage and from memory.
    """

    folder: str
    gguf: str
    memory: int
    context: int
    threads: int
    prompt: list[int]
    decode: list[int]
    warm_up: int
    storage: float
    bandwidth: float


def main() -> None:
    work = Work(**json.load(sys.stdin))
    print(json.dumps(RIVALS[sys.argv[1]](work)))


def llama_cpp(work: Work, *, repack: bool = False) -> dict[str, Any]:
    """Measure llama.cpp on a mapped file, not locked and by default not repacked.

    Repacked weights are faster, but are a copy that the system cannot reclaim, so the whole model
    must fit in memory.
    """
    llama: Any = import_module("llama_cpp")  # type checks do not depend on the optional package
    drop_page_cache([Path(work.gguf)])
    began = time.perf_counter()
    settings: Any = llama.llama_model_default_params()
    settings.load_mode, settings.use_extra_bufts = llama.LLAMA_LOAD_MODE_MMAP, repack
    model = llama.llama_model_load_from_file(work.gguf.encode(), settings)
    options: Any = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = work.context
    options.n_threads = options.n_threads_batch = work.threads
    context = llama.llama_init_from_model(model, options) if model else None
    if not model or not context:
        raise SystemExit(f"llama.cpp cannot load {work.gguf}")
    loaded = time.perf_counter() - began

    def feed(tokens: list[int]) -> None:
        ids = (llama.llama_token * len(tokens))(*tokens)
        if failed := llama.llama_decode(context, llama.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit(f"llama_decode returned {failed}")
        llama.llama_get_logits_ith(context, -1)

    return {
        **measured(work, feed, gguf_bytes_per_token(work.gguf)),
        "load_seconds": loaded,
        "model_bytes": os.path.getsize(work.gguf),
        "file": Path(work.gguf).name,
        "version": llama.__version__,
    }


def gguf_bytes_per_token(file: str) -> float:
    """Return the bytes of weights read per token: without embedding and experts not chosen."""
    reader = import_module("gguf").GGUFReader(file)
    kind = reader.fields["general.architecture"].contents()
    used, count = (
        reader.fields[f"{kind}.expert_{name}"].contents() for name in ("used_count", "count")
    )
    return sum(
        int(one.n_bytes) * (used / count if "_exps." in one.name else 1)
        for one in reader.tensors
        if one.name != "token_embd.weight"
    )


def accelerate(work: Work) -> dict[str, Any]:
    """Measure transformers with accelerate's disk offload and the same bytes for weights.

    It reads all experts of a layer for every token, so few tokens are decoded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from moefit.cache_argument import forward_with_cache

    few = max(2, (len(work.decode) - work.warm_up) // 8)
    work = replace(work, warm_up=1, decode=work.decode[: 1 + few])
    torch.set_num_threads(work.threads)
    files = list(Path(work.folder).glob("*.safetensors"))
    drop_page_cache(files)
    room = work.memory - status("VmHWM") - RESERVE
    if room <= 0:
        raise SystemExit(f"{work.memory} bytes are too few for accelerate to hold any weights")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path(work.folder).parent) as offload:
        model: Any = AutoModelForCausalLM.from_pretrained(
            work.folder,
            device_map="auto",
            max_memory={"cpu": room},
            offload_folder=offload,
            dtype="auto",
        ).eval()
        gc.collect()
        loaded = time.perf_counter() - began
        drop_page_cache([*files, *(path for path in Path(offload).rglob("*") if path.is_file())])
        cache: Any = None

        def feed(tokens: list[int]) -> None:
            nonlocal cache
            ids = torch.tensor([tokens])
            _, cache = forward_with_cache(model, cache, input_ids=ids)

        with torch.inference_mode():
            figures = measured(work, feed, bytes_per_token(model))
    placed = [str(where) for where in getattr(model, "hf_device_map", {}).values()]
    return {
        **figures,
        "load_seconds": loaded,
        "model_bytes": sum(path.stat().st_size for path in files),
        "modules_on_disk": f"{placed.count('disk')} of {len(placed)}",
        "version": version("accelerate"),
    }


def bytes_per_token(model: Any) -> float:
    """Return as `gguf_bytes_per_token` does for a transformers model with offloaded weights."""
    share = model.config.num_experts_per_tok / model.config.num_experts
    skipped = {id(one) for one in model.get_input_embeddings().parameters()}
    skipped -= {id(one) for one in model.get_output_embeddings().parameters()}
    return sum(
        one.nbytes * (share if ".experts." in name else 1)
        for name, one in model.named_parameters()
        if id(one) not in skipped
    )


def measured(work: Work, feed: Feed, bytes_per_token: float) -> dict[str, Any]:
    """Prefill, warm up, and time each token."""

    def timed(tokens: list[int]) -> float:
        began = time.perf_counter()
        feed(tokens)
        return time.perf_counter() - began

    prefill = timed(work.prompt)
    for token in work.decode[: work.warm_up]:
        feed([token])
    read = bytes_read()
    seconds = [timed([token]) for token in work.decode[work.warm_up :]]
    read = (bytes_read() - read) / len(seconds)
    storage_bound, memory_bound = read / work.storage, bytes_per_token / work.bandwidth
    return {
        "prompt_tokens": len(work.prompt),
        "new_tokens": len(seconds),
        "prefill_tokens_per_second": len(work.prompt) / prefill,
        "tokens_per_second": len(seconds) / sum(seconds),
        "median_seconds": statistics.median(seconds),
        "worst_seconds": max(seconds),
        "bytes_read_per_token": read,
        "storage_bound": storage_bound,
        "memory_bound": memory_bound,
        "ceiling": 1 / max(storage_bound, memory_bound),
        "peak_process_bytes": status("VmHWM"),
        "anonymous_bytes": status("RssAnon"),
        "bandwidth": {"storage": work.storage, "memory": work.bandwidth},
    }


def bytes_read() -> int:
    """Return the bytes that this process has read from storage, including page faults."""
    return _field("/proc/self/io", "read_bytes")


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    return _field("/proc/self/status", name) * 1024


def _field(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {name}")


def drop_page_cache(files: Iterable[Path]) -> None:
    """Drop the files' page cache, after flushing what was just written."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


RIVALS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "llama.cpp": llama_cpp,
    "llama.cpp-repacked": partial(llama_cpp, repack=True),
    "accelerate": accelerate,
}

if __name__ == "__main__":
    main()
