"""Refuse quantised weights that cannot be read, from configuration files and tensor names.

Quantised weights are integers or 8-bit floats whose scales are stored in separate tensors.
Converted to a model's dtype without the scales, they would give a model that loads but computes
nonsense. What `formats/` reads has been replaced by the weights that it stands for before this;
what is left of such tensors is refused here. No weights are read.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from moefit.checkpoint.formats.declared import Declared, declared
from moefit.checkpoint.formats.packed_integers import BITS
from moefit.checkpoint.safetensors import INDEX, SINGLE, Checkpoint, StoredTensor
from moefit.errors import UnsupportedModelError
from moefit.folders import is_gguf

READABLE = ("fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq", "fbgemm_fp8")
"""Methods, as configurations name them, whose weights `formats/` knows."""
_PACKED = ("gptq", "awq", "compressed-tensors")
_ORIGINAL = "give the model that it was made from, in bfloat16 or float16"
# Names of tensors that belong to a quantised weight, most specific first.
_SIGNS = tuple(
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        (r"[._](qweight|qzeros|g_idx)$", "GPTQ or AWQ integers"),
        (
            r"[._](weight_packed|weight_shape|weight_zero_point|(weight|input)_global_scale)$",
            "integers or 4-bit floats of compressed-tensors",
        ),
        (
            r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.[\w.]+$|[._](SCB|weight_format)$",
            "bitsandbytes, 4 or 8 bits",
        ),
        (r"_(blocks|scales)$", "MXFP4, 4-bit floats in blocks"),
        (r"[._]weight_scale_inv$", "8-bit floats in blocks"),
        (r"[._](weight_scale_2|pre_quant_scale)$", "4-bit floats or integers of modelopt"),
        (r"[._](weight|input|activation|act)_scale$", "8-bit floats or integers"),
        (r"[._]scales$", "integers in groups"),
        (r"[._]\w*scale\w*$", "weights that are to be multiplied by scales"),
    )
)
# Scales of a quantised KV cache; without quantisation of the cache they are not needed.
_OF_CACHE = re.compile(r"[._](([kqv]|kv|prob|kv_cache)_scale|[kv]_proj\.output_scale)$")


def refuse_unknown_method(folder: Path) -> Declared | None:
    """Return what a folder's configuration files declare, if its format can be read.

    Raises:
        UnsupportedModelError: The format that they declare cannot be read.
    """
    if (found := declared(folder)) is None:
        return None
    if found.method in _PACKED and (odd := found.widths() - {*BITS}):
        raise _refusal(
            f"{folder} is quantised to {min(odd)} bits ({found.method}), as its {found.where} "
            f"says; integers of {', '.join(map(str, BITS))} bits can be read"
        )
    if found.method in READABLE:
        return found
    raise UnsupportedModelError(
        f"{folder} is quantised ({found.method}), as its {found.where} says; the formats that can "
        f"be read are {', '.join(READABLE)}. Instead, {_ORIGINAL}"
    )


def refuse_gguf(folder: Path) -> None:
    """Raise UnsupportedModelError for a GGUF file, whatever the types of its tensors."""
    if is_gguf(folder):
        raise UnsupportedModelError(
            f"{folder} is a GGUF file, and only commands that serve a model read that: give one of "
            "those a budget (--memory), or here the model that it was made from, in safetensors"
        )


def refuse_declared(folder: Path) -> None:
    """Raise UnsupportedModelError if a folder's configuration files declare quantised weights.

    A GGUF file counts as quantised, whatever its types.
    """
    refuse_gguf(folder)
    if (found := declared(folder)) is not None:
        raise _refusal(
            f"{folder} is quantised ({found.method}), as its {found.where} says; only commands "
            "that serve a model (with --memory) and moefit export --format gguf read that"
        )


def refuse_integers(source: StoredTensor, parameter: str) -> None:
    """Raise UnsupportedModelError for integers or floats of 8 bits or less.

    Args:
        source: Location of the tensor.
        parameter: Name of the model's floating-point parameter that they would fill.
    """
    if source.dtype.is_floating_point and source.dtype.itemsize > 1:
        return
    dtype = str(source.dtype).removeprefix("torch.")
    raise _refusal(
        f"{source.spans[0].path.name}: {source.name} is {dtype}, but {parameter} takes "
        "floating-point numbers of 16 bits or more: the checkpoint is quantised, also if its "
        "config.json does not say so"
    )


def refuse_stored(folder: Path) -> None:
    """Refuse a quantised folder, for a model with only floating-point parameters.

    Without safetensors, only the configuration is checked.

    Raises:
        UnsupportedModelError: The weights are quantised.
        CheckpointError: A file is missing or damaged.
    """
    refuse_declared(folder)
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return
    with Checkpoint(folder) as stored:
        refuse_scales(folder, [name for name in stored.spans if sign_of(name)])
        for name, span in stored.spans.items():
            refuse_integers(span, name)


def sign_of(name: str) -> tuple[str, str] | None:
    """Split the name of a scale, or another part of a quantised weight.

    Args:
        name: A tensor's name in the checkpoint.

    Returns:
        The name of the weight, and the suffix that identifies the part; None for other tensors.

    >>> sign_of("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv")
    ('model.layers.0.mlp.experts.0.up_proj', '.weight_scale_inv')
    >>> sign_of("model.layers.0.self_attn.k_scale"), sign_of("model.norm.weight")
    (None, None)
    """
    if _OF_CACHE.search(name):
        return None
    for pattern, _ in _SIGNS:
        if found := pattern.search(name):
            return name[: found.start()], found[0]
    return None


def refuse_scales(folder: Path, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError if there are tensors of quantised weights, and say of which kind.

    Args:
        folder: The model's folder.
        names: Names for which `sign_of` returns a result; may be empty.
    """
    found = sorted(names)
    for pattern, meaning in _SIGNS:
        if marked := [name for name in found if pattern.search(name)]:
            raise _refusal(
                f"{folder} is quantised ({meaning}), also if its config.json does not say so: it "
                f"has {len(found)} tensors such as {marked[0]}, for which the model "
                "has no parameter"
            )


def _refusal(what: str, remedy: str = _ORIGINAL) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what}; {remedy}")
