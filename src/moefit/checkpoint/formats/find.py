"""Find the quantised weights among a checkpoint's tensors.

Tensors whose names differ in a known ending belong to one weight, and their kinds and shapes tell
its format, so that formats may be mixed and need not be declared. What no format claims is left as
it is; `quantisation.py` refuses it by name if the model needs it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from moefit.checkpoint.formats.declared import Declared
from moefit.checkpoint.formats.eight_bits import CODES, EightBits
from moefit.checkpoint.formats.encoding import EncodedTensor, Encoding
from moefit.checkpoint.formats.four_bit_floats import MX_GROUP, NV_GROUP, FourBitFloats
from moefit.checkpoint.formats.packed_integers import BITS, PackedColumns, PackedRows
from moefit.checkpoint.safetensors import Span, StoredTensor
from moefit.errors import CheckpointError

# Endings of names, the stem's replacement, and what the tensor is for. "" is for what only
# quantised activations need: values are computed with activations as they are.
_ENDINGS = tuple(
    (re.compile(rf"{ending}$"), instead, purpose)
    for ending, instead, purpose in (
        (r"\.(qweight|weight_packed)", ".weight", "weight"),
        (r"\.(weight_scale_inv|weight_scale|qscale_weight|scales)", ".weight", "scale"),
        (r"\.(weight_zero_point|qzeros)", ".weight", "zeros"),
        (r"\.(weight_g_idx|g_idx)", ".weight", "groups"),
        (r"\.weight_shape", ".weight", "shape"),
        (r"\.(weight_global_scale|weight_scale_2)", ".weight", "global"),
        (
            r"\.((input|activation|act)_scale(_inv)?|(input|output)_(global_scale|zero_point)"
            r"|qscale_act|output_scale)",
            ".weight",
            "",
        ),
        (r"_blocks", "", "weight"),
        (r"_(scales|scale_inv)", "", "scale"),
    )
)
_STEM_SCALE = re.compile(r"\.scale$")  # DeepSeek-V4's, and of some norms

Parts = dict[str, Span]
Claim = Callable[[str, Parts, Declared | None], Encoding | None]


def find_weights(
    spans: Mapping[str, Span], declared: Declared | None, dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors with the parts of each quantised weight joined into one.

    Args:
        spans: All tensors by name.
        declared: What the configuration says.
        dtype: Of the values of quantised weights.

    Raises:
        CheckpointError: A weight lacks a tensor that its format or its siblings have.
    """
    groups: dict[str, dict[str, list[Span]]] = {}
    for name, span in spans.items():
        if (found := part_of(name)) is not None:
            groups.setdefault(found[0], {}).setdefault(found[1], []).append(span)
    weights: dict[str, StoredTensor] = dict(spans)
    for name, group in groups.items():
        if "weight" not in group and name in spans:
            group["weight"] = [spans[name]]
        parts = {purpose: found[0] for purpose, found in group.items() if purpose}
        if any(len(found) > 1 for purpose, found in group.items() if purpose):
            continue
        if (encoding := _encoding(name, parts, declared)) is None:
            continue
        for span in (span for found in group.values() for span in found):
            del weights[span.name]
        weights[name] = EncodedTensor(
            name=name,
            shape=encoding.shape(parts),
            dtype=dtype,
            encoding=encoding,
            parts=tuple(parts.items()),
        )
    _check_complete([one for one in weights.values() if isinstance(one, EncodedTensor)], declared)
    return weights


_OPTIONAL = {"zeros": "zero points", "groups": "order of groups", "global": "global scale"}
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


def _check_complete(weights: Sequence[EncodedTensor], declared: Declared | None) -> None:
    """Raise CheckpointError for a weight without a tensor that is declared or its siblings have.

    Without zero points, for example, values would be wrong without an error.
    """
    # For experts of a layer that are stored alike: the parts that any of them has, and its name.
    owners_of: dict[tuple[str, Encoding], dict[str, str]] = defaultdict(dict)
    for weight in weights:
        key = _EXPERT.sub("#", weight.name), weight.encoding
        owners_of[key] |= {part: weight.name for part, _ in weight.parts}
    for weight in weights:
        parts = dict(weight.parts)
        needed = dict.fromkeys(_declared_parts(weight.encoding, declared), "its format")
        needed |= owners_of[_EXPERT.sub("#", weight.name), weight.encoding]
        for part, owner in needed.items():
            if part in _OPTIONAL and part not in parts:
                raise CheckpointError(
                    f"{weight.name} ({weight.encoding.format}) lacks the {_OPTIONAL[part]} that "
                    f"{owner} has; copy or download the checkpoint again"
                )


def _declared_parts(encoding: Encoding, declared: Declared | None) -> Iterator[str]:
    """Yield the optional tensors that an encoding has by its format or its declaration."""
    if isinstance(encoding, FourBitFloats) and encoding.group == NV_GROUP:
        yield "global"
    if isinstance(encoding, PackedColumns) and declared is not None:
        said = declared.values
        if said.get("zero_point") is True or said.get("sym") is False:
            yield "zeros"
        if said.get("desc_act") is True and not encoding.awq:
            yield "groups"


def part_of(name: str) -> tuple[str, str] | None:
    """Return the weight that a tensor belongs to, by its name, and what it is for.

    >>> part_of("layers.0.mlp.experts.3.up_proj.weight_scale_inv")
    ('layers.0.mlp.experts.3.up_proj.weight', 'scale')
    >>> part_of("layers.0.mlp.experts.down_proj_blocks")
    ('layers.0.mlp.experts.down_proj', 'weight')
    >>> part_of("layers.0.mlp.experts.3.up_proj.weight")
    """
    for pattern, instead, purpose in _ENDINGS:
        if found := pattern.search(name):
            return name[: found.start()] + instead, purpose
    if found := _STEM_SCALE.search(name):
        return name[: found.start()] + ".weight", "scale"
    return None


def _encoding(name: str, parts: Parts, declared: Declared | None) -> Encoding | None:
    """Return how a weight is stored; None if no format has these tensors."""
    if "weight" not in parts or "scale" not in parts:
        return None
    found = (claim(name, parts, declared) for claim in (_floats, _integers, _eight_bits))
    return next(filter(None, found), None)


def _floats(name: str, parts: Parts, declared: Declared | None) -> Encoding | None:
    """Claim 4-bit floats: bytes with one scale per 16 or 32 values."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype != torch.uint8 or set(parts) - {"weight", "scale", "global", "shape"}:
        return None
    packed = weight.name.endswith("weight_packed")  # compressed-tensors decodes to bfloat16
    return FourBitFloats(
        group=NV_GROUP if scale.dtype == torch.float8_e4m3fn else MX_GROUP,
        transposed=weight.name.endswith("_blocks"),
        divides="global" in parts and parts["global"].name.endswith("global_scale"),
        rounded=torch.bfloat16 if packed else torch.float32,
    )


def _integers(name: str, parts: Parts, declared: Declared | None) -> Encoding | None:
    """Claim integers packed into int32."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype != torch.int32 or len(weight.shape) < 2 or len(scale.shape) < 2:
        return None
    bits = (declared.bits(name.removesuffix(".weight")) if declared else None) or 4
    if bits not in BITS or "global" in parts:
        return None
    if weight.name.endswith("weight_packed"):
        return PackedRows(bits=bits)
    if len(weight.shape) != 2:
        return None
    if weight.shape[1] == scale.shape[1]:
        first = declared is None or declared.values.get("checkpoint_format") != "gptq_v2"
        in_order = declared is not None and declared.values.get("desc_act") is False
        return PackedColumns(bits=bits, offset=int(first), in_order=in_order)
    if weight.shape[1] * 8 == scale.shape[1] and bits == 4:
        return PackedColumns(bits=bits, awq=True)
    return None


def _eight_bits(name: str, parts: Parts, declared: Declared | None) -> Encoding | None:
    """Claim bytes, each of which is one value."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype not in CODES or set(parts) - {"weight", "scale", "zeros"}:
        return None
    inverse = scale.name.endswith("_inv")
    rounds = not inverse and declared is not None and declared.method == "compressed-tensors"
    return EightBits(
        kind="int8" if weight.dtype == torch.int8 else "fp8",
        block=declared.block() if declared else None,
        rounds=rounds,
    )
