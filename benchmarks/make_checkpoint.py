"""Write a checkpoint of a real model's shape with random weights, to measure speed.

    python benchmarks/make_checkpoint.py switch-base-64 FOLDER [--layers 12] [--fp8] [--gguf FILE]

Needs a few hundred MB of memory for any size. Names and layout are those on the Hub, from
transformers' reverse conversion of a model on the meta device; gpt-oss's experts are in MXFP4.
`--gguf` writes the same model once more (gpt-oss only), as published GGUF files have it: experts in
MXFP4, other matrices in Q8_0. `--fp8` writes the matrices of layers but the routers in FP8 with a
scale per 128 x 128, as Qwen's and DeepSeek's published files have them.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_gguf
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GptOssConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from moefit.evaluate.loading import locate

START: dict[str, Any] = {"decoder_start_token_id": 0}
WIDE_HEADS: dict[str, Any] = {"head_dim": 128}
SHAPES: dict[str, tuple[PreTrainedConfig, str, torch.dtype]] = {
    # google/switch-base-64: 12 of 24 layers sparse, 64 experts of 768 x 3072
    "switch-base-64": (
        SwitchTransformersConfig(
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12,
            num_experts=64, expert_capacity=64, num_sparse_encoder_layers=6,
            num_sparse_decoder_layers=6, **START,
        ),
        "SwitchTransformersForConditionalGeneration",
        torch.float32,
    ),
    # google/switch-base-16, the smallest of SwapMoE's
    "switch-base-16": (
        SwitchTransformersConfig(
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12,
            num_experts=16, expert_capacity=64, num_sparse_encoder_layers=6,
            num_sparse_decoder_layers=6, router_jitter_noise=0.0, **START,
        ),
        "SwitchTransformersForConditionalGeneration",
        torch.float32,
    ),
    # allenai/OLMoE-1B-7B-0924: 16 layers, 64 experts of 2048 x 1024, 8 per token
    "olmoe-1b-7b": (
        OlmoeConfig(num_experts=64, num_experts_per_tok=8, intermediate_size=1024),
        "OlmoeForCausalLM",
        torch.bfloat16,
    ),
    # openai/gpt-oss-20b: 24 layers, 32 experts of 2880 x 2880, 4 per token
    "gpt-oss-20b": (
        GptOssConfig(num_hidden_layers=24, num_local_experts=32),
        "GptOssForCausalLM",
        torch.bfloat16,
    ),
    # Qwen/Qwen3-30B-A3B: 48 layers, 128 experts of 2048 x 768, 8 per token
    "qwen3-30b-a3b": (
        Qwen3MoeConfig(
            hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, **WIDE_HEADS,
            num_key_value_heads=4, moe_intermediate_size=768, intermediate_size=6144,
            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151936,
            max_position_embeddings=40960,
        ),
        "Qwen3MoeForCausalLM",
        torch.bfloat16,
    ),
    # OLMoE at small scale, to try the benchmarks
    "olmoe-small": (
        OlmoeConfig(
            hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=8, num_experts=64, num_experts_per_tok=8, vocab_size=8192,
        ),
        "OlmoeForCausalLM",
        torch.bfloat16,
    ),
    # for servers, with the shipped model's vocabulary (--tokenizer reference)
    "olmoe-server": (
        OlmoeConfig(
            hidden_size=512, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, num_experts=32, num_experts_per_tok=4, vocab_size=4096,
            eos_token_id=None,
        ),
        "OlmoeForCausalLM",
        torch.bfloat16,
    ),
}  # fmt: skip
SHARD = 2 << 30
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
GROUP = 32  # weights that share a scale in MXFP4
SCALES = 120, 122  # exponents plus 127, from and below: weights of about 0.02
SIDE = 128  # rows and columns of a block that shares a scale in FP8
FP8_SCALE = 2.0**-12  # of weights of about 0.02: the codes' spread is then 82 of at most 448
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [SIDE, SIDE],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="a folder's, or reference: the shipped model's")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--fp8", action="store_true", help="matrices of layers in FP8")
    parser.add_argument("--gguf", type=Path, help="also write the model as this file")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.folder, arguments.layers, fp8=arguments.fp8)
    if arguments.gguf:
        make_gguf.write(arguments.folder, arguments.gguf)
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(locate(arguments.tokenizer))
        tokenizer.save_pretrained(arguments.folder)


def write(shape: str, folder: Path, layers: int | None = None, *, fp8: bool = False) -> None:
    config, architecture, dtype = SHAPES[shape]
    if layers is not None:
        changed = {"num_hidden_layers": layers, "layer_types": None}
        config = type(config)(**{**config.to_dict(), **changed})
    folder.mkdir(parents=True, exist_ok=True)
    model = on_meta(config, architecture, dtype)
    config.architectures = [architecture]
    config.dtype = dtype
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    if config.model_type == "gpt_oss":
        tensors = with_mxfp4(tensors)
        config.quantization_config = {"quant_method": "mxfp4"}
    elif fp8:
        tensors = with_fp8(tensors)
        config.quantization_config = FP8
    config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    shards = list(in_shards({k: v for k, v in tensors.items() if k not in tied}))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16 << 20, generator=generator) * 0.02
    noise = {
        "weights": normal.to(dtype),
        "fp8": (normal / FP8_SCALE).to(torch.float8_e4m3fn),
        "codes": torch.randint(256, (16 << 20,), dtype=torch.uint8, generator=generator),
        "scales": torch.randint(*SCALES, (1 << 20,), dtype=torch.uint8, generator=generator),
    }
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shard, noise)
        where |= dict.fromkeys(shard, name)
        print(f"{folder / name}: {len(shard)} tensors", flush=True)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def with_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the experts' matrices [E, I, O] by blocks [E, O, I / 32, 16] and scales."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj") or ".experts." not in name:
            out[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // GROUP)
        for suffix, its_shape in (("blocks", (*shape, GROUP // 2)), ("scales", shape)):
            out[f"{name}_{suffix}"] = torch.empty(its_shape, dtype=torch.uint8, device="meta")
    return out


def with_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace matrices of layers [R, C], routers apart, by codes and scales per block."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        if name.endswith("_proj.weight"):
            blocks = tuple(-(-size // SIDE) for size in tensor.shape)
            out[name] = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device="meta")
            out[f"{name}_scale_inv"] = torch.empty(blocks, dtype=torch.bfloat16, device="meta")
    return out


def on_meta(config: PreTrainedConfig, architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    family: Any = getattr(transformers, architecture)
    with torch.device("meta"):
        return family._from_config(AutoConfig.for_model(**config.to_dict()), dtype=dtype)


def in_shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def write_shard(path: Path, shard: dict[str, torch.Tensor], noise: dict[str, torch.Tensor]) -> None:
    header, offset = {}, 0
    for name, tensor in shard.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for number, (name, tensor) in enumerate(shard.items()):
            for block in blocks(name, tensor, noise[kind_of(name, tensor)], number):
                file.write(block)


def kind_of(name: str, tensor: torch.Tensor) -> str:
    """Return which noise a tensor is made of."""
    if tensor.dtype == torch.uint8:
        return "scales" if name.endswith("_scales") else "codes"
    return "fp8" if tensor.dtype == torch.float8_e4m3fn else "weights"


def blocks(
    name: str, tensor: torch.Tensor, noise: torch.Tensor, number: int
) -> Iterator[memoryview]:
    """Yield the tensor's bytes: one value in norms and FP8's scales, else windows of the noise."""
    if "norm" in name or name.endswith("_scale_inv"):
        value = 1.0 if "norm" in name else FP8_SCALE
        data: Any = torch.full((tensor.numel(),), value, dtype=tensor.dtype)
        data = data.view(torch.uint8).numpy()
        yield memoryview(data)
        return
    if "embed_tokens" in name or "shared.weight" in name:
        noise = noise * 50  # so that tokens differ and are not all routed alike
    left, start = tensor.numel(), (number * 7919 * 64) % (len(noise) // 2)
    while left:
        count = min(left, len(noise) - start)
        data = noise[start : start + count].view(torch.uint8).numpy()
        yield memoryview(data)
        left, start = left - count, (start + 104729) % (len(noise) // 2)


if __name__ == "__main__":
    main()
