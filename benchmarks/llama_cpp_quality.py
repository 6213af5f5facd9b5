"""Quantise a GGUF file with llama.cpp and score windows of ids, for quality_against_gguf.py.

    PYTHON benchmarks/llama_cpp_quality.py < WORK.json

WORK has `file` (f16), `folder` for the quantised files, `types`, `windows` of ids, `threads` and
`importance`, an .npz with the mean squared inputs of each tensor's columns. Prints a JSON line per
type; a type that ends in `+imatrix` is quantised with them. Needs llama-cpp-python and gguf alone.
"""

import ctypes
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

llama: Any = import_module("llama_cpp")
IMATRIX = "+imatrix"


def main() -> None:
    work = json.load(sys.stdin)
    silence = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    importance = dict(np.load(work["importance"]))
    for kind in work["types"]:
        path = Path(work["file"])
        if kind != "F16":
            path = Path(work["folder"]) / f"{kind}.gguf"
            quantise(work["file"], path, kind, importance, work["threads"])
        losses = scored(path, work["windows"], work["threads"])
        print(json.dumps({"type": kind, "losses": losses, **sizes(path)}), flush=True)


def quantise(source: str, path: Path, kind: str, importance: dict[str, Any], threads: int) -> None:
    settings = llama.llama_model_quantize_default_params()
    settings.nthread = threads
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind.removesuffix(IMATRIX)}")
    kept: list[Any] = []
    if kind.endswith(IMATRIX):
        rows = (llama.llama_model_imatrix_data * (len(importance) + 1))()  # ends with a null name
        for row, (name, values) in zip(rows, importance.items(), strict=False):
            data = np.ascontiguousarray(values.reshape(-1), dtype=np.float32)
            kept.append(data)
            row.name, row.size = name.encode(), data.size
            row.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = rows
        kept.append(rows)
    failed = llama.llama_model_quantize(source.encode(), str(path).encode(), settings)
    assert not failed, f"llama.cpp cannot quantise to {kind}"


def scored(path: Path, windows: list[list[int]], threads: int) -> list[float]:
    """Return each window's loss in nats per token; its first token is context only."""
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(windows[0])
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    losses = [loss(context, window, size) for window in windows]
    llama.llama_free(context)
    llama.llama_model_free(model)
    return losses


def loss(context: Any, window: list[int], size: int) -> float:
    inputs = window[:-1]
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(inputs), 0, 1)
    batch.n_tokens = len(inputs)
    for position, token in enumerate(inputs):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = 1
    assert llama.llama_decode(context, batch) == 0
    pointer = llama.llama_get_logits(context)
    logits_LV = np.ctypeslib.as_array(pointer, shape=(len(inputs), size)).astype(np.float64)
    llama.llama_batch_free(batch)
    logits_LV -= logits_LV.max(axis=1, keepdims=True)
    chosen_L = logits_LV[np.arange(len(inputs)), window[1:]]
    return float(np.mean(np.log(np.exp(logits_LV).sum(axis=1)) - chosen_L))


def sizes(path: Path) -> dict[str, Any]:
    tensors = import_module("gguf").GGUFReader(path).tensors
    experts = [one for one in tensors if "_exps." in one.name]
    return {
        "expert_bytes": sum(int(one.n_bytes) for one in experts),
        "weight_bytes": sum(int(one.n_bytes) for one in tensors),
        "file_bytes": path.stat().st_size,
        "expert_types": sorted({one.tensor_type.name for one in experts}),
    }


if __name__ == "__main__":
    main()
