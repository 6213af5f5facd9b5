"""Write a gpt-oss checkpoint in MXFP4 as a GGUF file, as llama.cpp's converter does.

Experts keep their codes and scales; other matrices become Q8_0, vectors and routers float32. The
file has no vocabulary and takes token ids only. Holds one expert's matrix at a time. Used by
make_checkpoint.py.

Shapes: E experts, R rows, G groups of 32 weights.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from safetensors import safe_open
from transformers import AutoConfig

from moefit.checkpoint.gguf.families import FAMILIES, expert_name, name_in_file
from moefit.gguf.families import describe, stays_float32

FAMILY = FAMILIES["gpt_oss"]
PREFIX = "model.layers.{}.mlp.experts."
ROWS_AT_ONCE = 4096
Data = Callable[[], Iterator[Any]]


class Entry(NamedTuple):
    """A tensor of the file: its type, its shape in weights, and what yields its bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: Data


def write(folder: Path, path: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(folder / name, "pt") for name in sorted(set(where.values()))}
    slices = {name: files[file].get_slice(name) for name, file in where.items()}
    entries = [*dense(slices)]
    for layer in range(config.num_hidden_layers):
        entries += experts(slices, layer)
    writer = gguf.GGUFWriter(path, FAMILY.architecture)
    add_metadata(writer, config)
    for one in entries:
        number = gguf.GGMLQuantizationType[one.type]
        values, size = gguf.GGML_QUANT_SIZES[number]
        nbytes = int(np.prod(one.shape)) // values * size
        writer.add_tensor_info(one.name, one.shape, np.dtype("f4"), nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        for one in entries:
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            for part in one.data():
                file.write(np.ascontiguousarray(part).data.cast("B"))
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
    print(f"{path}: {len(entries)} tensors", flush=True)


def add_metadata(writer: Any, config: Any) -> None:
    rows = config.num_attention_heads * config.head_dim
    describe(writer, replace(FAMILY, fields=()), config, rows)
    rope = config.rope_parameters
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")


def dense(slices: dict[str, Any]) -> Iterator[Entry]:
    for name, stored in slices.items():
        if (own := name_in_file(FAMILY, name)) is not None:
            shape = tuple(stored.get_shape())
            kind = "F32" if stays_float32(own, shape) else "Q8_0"
            yield Entry(own, kind, shape, partial(rounded, stored, kind))


def rounded(stored: Any, kind: str) -> Iterator[Any]:
    for first in range(0, stored.get_shape()[0], ROWS_AT_ONCE):
        values = stored[first : first + ROWS_AT_ONCE].float().numpy()
        yield gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def experts(slices: dict[str, Any], layer: int) -> Iterator[Entry]:
    """Yield a layer's experts, whose rows of gate and up alternate in the checkpoint."""
    prefix = PREFIX.format(layer)
    turns = {"gate": ("gate_up", slice(0, None, 2)), "up": ("gate_up", slice(1, None, 2))}
    for part, (source, rows) in {**turns, "down": ("down", slice(None))}.items():
        codes, scales, bias = (
            slices[f"{prefix}{source}_proj_{suffix}"] for suffix in ("blocks", "scales", "bias")
        )
        experts, width, groups, half = codes.get_shape()
        count = len(range(width)[rows])
        matrices = partial(blocks, codes, scales, rows)
        name = expert_name(layer, part)
        yield Entry(name, "MXFP4", (experts, count, groups * half * 2), matrices)
        biases = partial(vectors, bias, rows)
        yield Entry(name.replace(".weight", ".bias"), "F32", (experts, count), biases)


def blocks(codes: Any, scales: Any, rows: slice) -> Iterator[Any]:
    """Yield each expert's blocks: a scale, then codes, n and n + 16 in one byte.

    In the checkpoint, neighbours are in one.
    """
    for expert in range(codes.get_shape()[0]):
        codes_RGB, scales_RG = codes[expert].numpy()[rows], scales[expert].numpy()[rows]
        first, second = codes_RGB[..., :8], codes_RGB[..., 8:]
        out = np.empty((*scales_RG.shape, 17), np.uint8)
        out[..., 0] = scales_RG
        out[..., 1::2] = (first & 15) | (second << 4)
        out[..., 2::2] = (first >> 4) | (second & 240)
        yield out


def vectors(bias: Any, rows: slice) -> Iterator[Any]:
    yield bias[:].float().numpy()[:, rows]
