"""Write a GGUF file with the types of a quantised one and random codes, to measure speed.

    python benchmarks/make_kquants.py SHAPE.gguf TYPES.gguf OUT.gguf

Quantising a large model to K-quants takes long, and in memory values do not affect speed. Where
experts are read they do: with random codes nearly all tokens choose the same experts, so quantise
the model itself to compare under a memory limit. Shapes,
settings and vocabulary are those of SHAPE.gguf (moefit export --format gguf --type q4_0). A
tensor has the type of the same name in TYPES.gguf, a narrow model with as many layers, experts
and heads per key head, on which the quantiser's choices depend (llama-quantize F16.gguf
TYPES.gguf Q4_K_M). Needs a few hundred MB of memory for any size.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SCALE = np.float16(1e-4)
HALVES = {  # where a block has its scales of 16 bits, in bytes (ggml-common.h)
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("shape", "types", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    shape, types = gguf.GGUFReader(arguments.shape), gguf.GGUFReader(arguments.types)
    kinds = {one.name: one.tensor_type for one in types.tensors}
    if missing := [one.name for one in shape.tensors if one.name not in kinds]:
        parser.error(f"{arguments.types} has no tensor {missing[0]}: another number of layers?")
    write(shape, kinds, types.fields["general.file_type"].contents(), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.2f} GB")


def write(shape: Any, kinds: dict[str, Any], file_type: int, path: Path) -> None:
    """Write settings, names, shapes and types; then the data, one tensor at a time."""
    writer = gguf.GGUFWriter(path, shape.fields["general.architecture"].contents())
    copy_settings(shape, writer)
    writer.add_file_type(file_type)
    for one in shape.tensors:
        kind, sizes = kinds[one.name], stored_shape(one, kinds[one.name])
        dtype = np.dtype(np.uint8) if kind.name in HALVES else one.data.dtype
        nbytes = math.prod(sizes) * dtype.itemsize
        writer.add_tensor_info(one.name, sizes, dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for one in shape.tensors:
        kind = kinds[one.name]
        if kind.name in HALVES:
            writer.write_tensor_data(random_blocks(kind, stored_shape(one, kind), generator))
        else:
            writer.write_tensor_data(np.ascontiguousarray(one.data))
    writer.close()


def stored_shape(tensor: Any, kind: Any) -> list[int]:
    """Return a tensor's sizes, outermost first; of K-quants the last in bytes."""
    sizes = [int(size) for size in reversed(tensor.shape)]
    if kind.name not in HALVES:
        if kind != tensor.tensor_type:
            raise SystemExit(f"{tensor.name} is {kind.name}: only K-quants are written anew")
        return sizes
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return [*sizes[:-1], sizes[-1] // weights * nbytes]


def random_blocks(kind: Any, sizes: list[int], generator: Any) -> Any:
    """Return random codes with scales that keep all products finite."""
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = generator.integers(0, 256, (math.prod(sizes) // nbytes, nbytes), np.uint8)
    for at in HALVES[kind.name]:
        blocks[:, at : at + 2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    return blocks.reshape(sizes)


def copy_settings(shape: Any, writer: Any) -> None:
    """Copy all settings but those that a writer makes itself."""
    made = {"general.architecture", "general.file_type"}
    for field in shape.fields.values():
        if field.name in made or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)


if __name__ == "__main__":
    main()
