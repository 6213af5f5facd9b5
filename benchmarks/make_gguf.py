"""Convert an OLMoE-shaped safetensors checkpoint to a GGUF file for llama.cpp.

    python benchmarks/make_gguf.py FOLDER FILE.gguf [--type Q8_0|Q4_0|F16|F32]

One GGUF tensor is in memory at a time, and one unquantised expert. Matrices have the given type;
norms and routers stay F32, as in llama.cpp's converter. The vocabulary is llama.cpp's "no_vocab",
for input of token ids. Needs `gguf`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from moefit.checkpoint.safetensors import Checkpoint, Span

gguf: Any = import_module("gguf")  # type checks do not depend on the optional package
TYPES = ("F32", "F16", "Q8_0", "Q4_0")
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}
EXPERTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of the GGUF file: the tensors of the checkpoint that it stacks, and its type."""

    name: str
    spans: tuple[Span, ...]
    shape: tuple[int, ...]
    type: str

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """`shape` with the last axis in quantised bytes."""
        return gguf.quant_shape_to_byte_shape(self.shape, number(self.type))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q8_0")
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.file, arguments.type)
    print(f"{arguments.file}: {arguments.file.stat().st_size:,} bytes")


def convert(folder: Path, file: Path, kind: str) -> None:
    writer = gguf.GGUFWriter(file, "olmoe")
    config = AutoConfig.from_pretrained(folder)
    describe(writer, config)
    with Checkpoint(folder) as checkpoint:
        entries = list(layout(checkpoint, config, kind))
        for entry in entries:
            nbytes = int(np.prod(entry.byte_shape))
            # with a raw dtype, the writer expects the shape in elements
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype("f4"), nbytes, number(entry.type)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(quantised(checkpoint, entry))
    writer.close()


def describe(writer: Any, config: Any) -> None:
    """Write the metadata that llama.cpp's olmoe loader reads."""
    if config.model_type != "olmoe" or config.norm_topk_prob or config.clip_qkv:
        raise SystemExit(
            "llama.cpp's olmoe supports neither other model types nor norm_topk_prob and clip_qkv"
        )
    writer.add_name("benchmark")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("no_vocab")


def layout(checkpoint: Checkpoint, config: Any, kind: str) -> Iterator[Entry]:
    """Yield all tensors in the file's order."""
    spans = checkpoint.spans
    for name, source in OUTER.items():
        yield single(name, spans[source], kind)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, source in LAYER.items():
            yield single(f"blk.{layer}.{name}", spans[f"{prefix}.{source}"], kind)
        for part in EXPERTS:
            stack = tuple(
                spans[f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"]
                for expert in range(config.num_experts)
            )
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            yield Entry(name=name, spans=stack, shape=(len(stack), *stack[0].shape), type=kind)


def single(name: str, span: Span, kind: str) -> Entry:
    exact = len(span.shape) == 1 or "ffn_gate_inp" in name
    own = "F32" if exact else kind
    return Entry(name=name, spans=(span,), shape=span.shape, type=own)


def number(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind]


def quantised(checkpoint: Checkpoint, entry: Entry) -> np.ndarray[Any, Any]:
    """Return the tensor's bytes; its parts are read and quantised one at a time."""
    out = np.empty((len(entry.spans), *entry.byte_shape[-2:]), dtype=np.uint8)
    for row, span in zip(out, entry.spans, strict=True):
        values: Any = checkpoint.tensor(span).float().numpy()
        row[:] = gguf.quantize(values, number(entry.type)).view(np.uint8)
    return out.reshape(entry.byte_shape)


if __name__ == "__main__":
    main()
