"""Find the weights of a model among the tensors of a GGUF file.

Each tensor gets the name and the shape that it has in the model, or in a checkpoint of its family:
one name per expert where the family's checkpoints have one, so that an expert is a byte range of
each stacked tensor. Plain tensors stay what they are; quantised ones, and rows in llama.cpp's
order, become encoded weights. No weights are read.

Shapes: E experts, F expert width, D model width.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.checkpoint.gguf.encoding import GgmlBlocks, Interleaved
from moefit.checkpoint.gguf.families import (
    FAMILIES,
    ROTATED,
    SHARED_ROUTER,
    ExpertTensor,
    Family,
    expert_of,
    name_in_model,
)
from moefit.checkpoint.gguf.header import GgufHeader, GgufTensor
from moefit.checkpoint.safetensors import StoredTensor
from moefit.errors import CheckpointError, UnsupportedModelError

_BOTH = ("gate", "up")


def weights_of(
    header: GgufHeader, settings: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """Return the tensors of a file by their names in the model.

    Args:
        header: The file.
        settings: Its settings, as `settings_of` returns them.
        dtype: Of the values of quantised weights.

    Raises:
        CheckpointError: Tensors contradict each other.
        UnsupportedModelError: There is a tensor that models of this architecture do not have.
    """
    family = FAMILIES[settings["model_type"]]
    weights: dict[str, StoredTensor] = {}
    stacks: dict[tuple[int, str], dict[str, GgufTensor]] = {}
    unknown: list[str] = []
    for name, one in header.tensors.items():
        if _predicts(settings, name):
            weights[f"mtp.{name}"] = one.span
        elif (expert := expert_of(name)) is not None:
            if family.experts:
                weights.update(_of_experts(family, expert, one, dtype))
            else:
                stacks.setdefault((expert.layer, expert.suffix), {})[expert.part] = one
        elif (parameter := name_in_model(family, name)) is not None:
            weights[parameter] = _dense(family, settings, name, parameter, one, dtype)
        else:
            unknown.append(name)
    for (layer, suffix), parts in stacks.items():
        weights.update(_joined(layer, suffix, parts, dtype))
    if unknown:
        raise UnsupportedModelError(
            f"{header.path} has {len(unknown)} tensors that {header.architecture} models do not "
            f"have here ({', '.join(unknown[:3])}), and the model would answer otherwise without "
            "them; give the model that it was made from"
        )
    return weights


def _predicts(settings: Mapping[str, Any], name: str) -> bool:
    """Return whether a tensor is of a layer that predicts further tokens (MTP)."""
    layers = settings["num_hidden_layers"]
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return found is not None and 0 <= int(found[1]) - layers < settings.get(
        "num_nextn_predict_layers", 0
    )


def _dense(
    family: Family,
    settings: Mapping[str, Any],
    name: str,
    parameter: str,
    one: GgufTensor,
    dtype: torch.dtype,
) -> StoredTensor:
    if name.endswith(SHARED_ROUTER) and len(one.shape) == 1:
        shape = (1, *one.shape)
        one = replace(one, shape=shape, span=replace(one.span, shape=(1, *one.span.shape)))
    pairs = 0
    if family.rotates_pairs and ROTATED.search(name):
        pairs = settings["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
    return _weight(parameter, one, dtype, pairs=pairs)


def _of_experts(
    family: Family, which: ExpertTensor, one: GgufTensor, dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the weights of each expert in a tensor, by the name in the family's checkpoints."""
    experts, number = f"model.layers.{which.layer}.mlp.experts", which.number
    if which.part == "gate_up":
        yield f"{experts}.gate_up_proj", _weight(f"{experts}.gate_up_proj", one, dtype)
        return
    if number is None and len(one.shape) != 3:
        raise CheckpointError(
            f"{one.span.name} is {list(one.shape)}, but should be a stack of matrices, one per "
            "expert; copy or download the file again"
        )
    for expert in range(one.shape[0]) if number is None else (number,):
        name = f"{experts}.{expert}.{family.experts[which.part]}.{which.suffix}"
        own = one if number is not None else _row(one, expert)
        yield name, _weight(name, own, dtype)


def _row(one: GgufTensor, index: int) -> GgufTensor:
    return replace(one, shape=one.shape[1:], span=one.span.row(index))


def _weight(
    name: str, one: GgufTensor, dtype: torch.dtype, *, pairs: int = 0, transposed: bool = False
) -> StoredTensor:
    """Return a tensor under a name: plain if its bytes are the model's, otherwise encoded."""
    if one.type.dtype is not None and not pairs and not transposed:
        return replace(one.span, name=name)
    encoding = GgmlBlocks(type=one.type.name, pairs=pairs, transposed=transposed)
    parts = {"weight": one.span}
    return EncodedTensor(
        name=name,
        shape=encoding.shape(parts),
        dtype=dtype,
        encoding=encoding,
        parts=tuple(parts.items()),
    )


def _joined(
    layer: int, suffix: str, parts: Mapping[str, GgufTensor], dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield stacks as gpt-oss has them: matrices transposed, gate and up in turn."""
    if missing := sorted({*_BOTH, "down"} - parts.keys()):
        raise CheckpointError(
            f"layer {layer} has no experts' {suffix} for {', '.join(missing)}; copy or download "
            "the file again"
        )
    experts = f"model.layers.{layer}.mlp.experts"
    is_bias = suffix == "bias"
    end = "_bias" if is_bias else ""
    name = f"{experts}.down_proj{end}"
    yield name, _weight(name, parts["down"], dtype, transposed=not is_bias)
    gate, up = (GgmlBlocks(type=parts[part].type.name, transposed=not is_bias) for part in _BOTH)
    encoding = Interleaved(gate=gate, up=up)
    spans = {part: parts[part].span for part in _BOTH}
    name = f"{experts}.gate_up_proj{end}"
    yield (
        name,
        EncodedTensor(
            name=name,
            shape=encoding.shape(spans),
            dtype=dtype,
            encoding=encoding,
            parts=tuple(spans.items()),
        ),
    )
