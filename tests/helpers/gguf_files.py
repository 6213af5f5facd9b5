"""Write GGUF files with the `gguf` package: from arrays, or from another file with changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_file(
    out: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, str] | None = None,
    *,
    most: int = 0,
) -> Path:
    """Write a file.

    Args:
        out: The file.
        metadata: Values by key, with `general.architecture`; pairs are a value and its type.
        tensors: Values in float32 by name; or bytes, uint8, of blocks of the type.
        types: Types of tensors by name; float32 for the others.
        most: Tensors in a file; more are split into several.

    Returns:
        The file, or the first of several.
    """
    architecture = metadata["general.architecture"]
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=most)
    for name, value in metadata.items():
        if name != "general.architecture":
            value, *kinds = value if isinstance(value, tuple) else (value, kind_of(value))
            writer.add_key_value(name, value, *kinds)
    for name, data in tensors.items():
        number = gguf.GGMLQuantizationType[(types or {}).get(name, "f32").upper()]
        if (stored := data).dtype != np.uint8:
            stored = gguf.quantize(np.ascontiguousarray(data, np.float32), number)
        writer.add_tensor(name, stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out if not most else sorted(out.parent.glob(f"{out.stem}-00001-of-*.gguf"))[0]


def kind_of(value: Any) -> gguf.GGUFValueType:
    """Return the type of a value's entry: numbers are of 32 bits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a file's metadata as `write_file` takes it, and its tensors decoded to float32."""
    reader = gguf.GGUFReader(path)
    metadata = {
        name: (field.contents(), *field.types[:2])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        one.name: gguf.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1].tolist())
        for one in reader.tensors
    }
    return metadata, tensors
