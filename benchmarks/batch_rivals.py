"""Measure other systems with many sequences at once; batch_speed.py starts them.

    python benchmarks/batch_rivals.py llama.cpp|llama.cpp-repacked|transformers < BATCH.json

Reads a `Batch` as JSON and prints one JSON line. llama.cpp decodes one token of each sequence per
batch, as its server does with as many slots, but without a server and without sampling:
the tokens are given. transformers generates with `generate`, which samples.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rivals

BATCH = 2048  # tokens of prompts that llama.cpp takes at once: its server's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Model files and tokens: a prompt for each sequence, and what it decodes."""

    folder: str
    gguf: str
    threads: int
    prompts: list[list[int]]
    decode: list[list[int]]


def main() -> None:
    batch = Batch(**json.load(sys.stdin))
    print(json.dumps(RIVALS[sys.argv[1]](batch)))


def speeds(batch: Batch, prompts: float, decoding: float) -> dict[str, Any]:
    """Return what all systems report, from the seconds of prompts and of decoding."""
    sequences, prompt, new = len(batch.prompts), len(batch.prompts[0]), len(batch.decode[0])
    return {
        "sequences": sequences,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "prompt_seconds": prompts,
        "decode_seconds": decoding,
        "prompt_tokens_per_second": sequences * prompt / prompts,
        "decode_tokens_per_second": sequences * new / decoding,
        "tokens_per_second": sequences * new / (prompts + decoding),
        "peak_process_bytes": rivals.status("VmHWM"),
    }


def llama_cpp(batch: Batch, *, repack: bool = False) -> dict[str, Any]:
    llama: Any = import_module("llama_cpp")
    settings: Any = llama.llama_model_default_params()
    settings.load_mode, settings.use_extra_bufts = llama.LLAMA_LOAD_MODE_MMAP, repack
    model = llama.llama_model_load_from_file(batch.gguf.encode(), settings)
    sequences, length = len(batch.prompts), len(batch.prompts[0]) + len(batch.decode[0])
    options: Any = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_seq_max = sequences * length, BATCH, sequences
    options.kv_unified = True
    options.n_threads = options.n_threads_batch = batch.threads
    context = llama.llama_init_from_model(model, options) if model else None
    if not context:
        raise SystemExit(f"llama.cpp cannot load {batch.gguf}")
    tokens: Any = llama.llama_batch_init(BATCH, 0, 1)

    def decode(items: list[tuple[int, int, int, bool]]) -> None:
        """Process (token, position, sequence, whether logits are needed)."""
        tokens.n_tokens = len(items)
        for number, (token, position, sequence, logits) in enumerate(items):
            tokens.token[number], tokens.pos[number] = token, position
            tokens.n_seq_id[number], tokens.seq_id[number][0] = 1, sequence
            tokens.logits[number] = logits
        if failed := llama.llama_decode(context, tokens):
            raise SystemExit(f"llama_decode returned {failed}")
        llama.llama_get_logits_ith(context, -1)

    first = [
        (token, place, number, place == len(prompt) - 1)
        for number, prompt in enumerate(batch.prompts)
        for place, token in enumerate(prompt)
    ]
    began = time.perf_counter()
    for at in range(0, len(first), BATCH):
        decode(first[at : at + BATCH])
    prompts = time.perf_counter() - began
    began, start = time.perf_counter(), len(batch.prompts[0])
    for step in range(len(batch.decode[0])):
        decode([(row[step], start + step, n, True) for n, row in enumerate(batch.decode)])
    decoding = time.perf_counter() - began
    return {
        **speeds(batch, prompts, decoding),
        "file": Path(batch.gguf).name,
        "version": llama.__version__,
    }


def transformers(batch: Batch) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    class Clock:
        """A logits processor that notes the time."""

        def __init__(self) -> None:
            self.all: list[float] = []

        def __call__(self, _ids: Any, scores: Any) -> Any:
            self.all.append(time.perf_counter())
            return scores

    torch.set_num_threads(batch.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(batch.folder, dtype="auto").eval()
    ids, new, clock = torch.tensor(batch.prompts), len(batch.decode[0]), Clock()
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        logits_processor=[clock],
    )
    first, last = clock.all[0], clock.all[-1]
    return {**speeds(batch, first - began, last - first), "version": version("transformers")}


RIVALS = {
    "llama.cpp": llama_cpp,
    "llama.cpp-repacked": partial(llama_cpp, repack=True),
    "transformers": transformers,
}

if __name__ == "__main__":
    main()
