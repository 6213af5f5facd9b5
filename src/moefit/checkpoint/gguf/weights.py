"""Find the weights of a model among the tensors of a GGUF file.

Each tensor gets the name and the shape that it has in the model, or in a checkpoint of its family:
one name per expert where the family's checkpoints have one, so that an expert is a byte range of
each stacked tensor. Plain tensors stay what they are; quantised ones, and rows in llama.cpp's
order, become encoded weights. No weights are read.

Shapes: E experts, F expert width, D model width.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.checkpoint.gguf.delta_net import PIECES, Heads, joint_projection, weight_of
from moefit.checkpoint.gguf.encoding import GateAboveUp, GgmlBlocks, Interleaved, LatentHeads
from moefit.checkpoint.gguf.families import (
    FAMILIES,
    LATENT_PARTS,
    ROTATED,
    SHARED_PARTS,
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
_FURTHER = "mtp."  # before the names of tensors that predict further tokens


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
    pieces: dict[str, dict[str, GgufTensor]] = {}
    unknown: list[str] = []
    for name, one in header.tensors.items():
        if _predicts(settings, name):
            weights[f"{_FURTHER}{name}"] = one.span
        elif (expert := expert_of(name)) is not None:
            if not family.joined:
                weights.update(_of_experts(family, expert, one, dtype))
            else:
                stacks.setdefault((expert.layer, expert.suffix), {})[expert.part] = one
        elif (piece := _piece_of(family, settings, name)) is not None:
            pieces.setdefault(piece[0], {})[piece[1]] = one
        elif (parameter := name_in_model(family, name)) is not None:
            weights[parameter] = _dense(family, settings, name, parameter, one, dtype)
        else:
            unknown.append(name)
    weights.update(_joined(family, settings, stacks, pieces, dtype, weights))
    _refuse_tensors(header, unknown)
    return weights


def refuse_left_out(header: GgufHeader, unused: Iterable[str]) -> None:
    """Raise UnsupportedModelError for weights that a model has no place for.

    Args:
        header: The file.
        unused: Names, as `weights_of` returns them, of weights that the model does not load. Those
            that predict further tokens may be left out.
    """
    _refuse_tensors(header, [name for name in unused if not name.startswith(_FURTHER)])


def _refuse_tensors(header: GgufHeader, names: list[str]) -> None:
    if names:
        raise UnsupportedModelError(
            f"{header.path} has {len(names)} tensors that {header.architecture} models do not have "
            f"here ({', '.join(names[:3])}), and without them the outputs would differ; give the "
            "model that it was made from"
        )


def _predicts(settings: Mapping[str, Any], name: str) -> bool:
    """Return whether a tensor is of a layer that predicts further tokens (MTP)."""
    layers = settings["num_hidden_layers"]
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return found is not None and 0 <= int(found[1]) - layers < settings.get(
        "num_nextn_predict_layers", 0
    )


def _piece_of(family: Family, settings: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """Return the parameter that a tensor is a part of, and which part; None for others."""
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if found is None:
        return None
    layer = f"model.layers.{found[1]}"
    if "self_attn.kv_b_proj.weight" in family.layer and found[2] in LATENT_PARTS:
        return f"{layer}.self_attn.kv_b_proj.weight", LATENT_PARTS[found[2]]
    if "shared_mlp.output_linear.weight" in family.layer and found[2] in SHARED_PARTS:
        return f"{layer}.shared_mlp.input_linear.weight", SHARED_PARTS[found[2]]
    if family.delta_net == "joint" and found[2] in PIECES and _is_linear(settings, int(found[1])):
        return f"{layer}.linear_attn.in_proj_qkvz.weight", PIECES[found[2]]
    return None


def _is_linear(settings: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer is a gated delta net, where llama.cpp also has joint attention."""
    types = settings["layer_types"]
    return layer < len(types) and types[layer] == "linear_attention"


def _of_pieces(
    settings: Mapping[str, Any],
    parameter: str,
    parts: Mapping[str, GgufTensor],
    dtype: torch.dtype,
) -> StoredTensor:
    """Return a dense weight that a file has in two tensors."""
    if parameter.endswith("in_proj_qkvz.weight"):
        _refuse_missing(parameter, parts, tuple(PIECES.values()))
        return joint_projection(parameter, parts, Heads.of(settings), dtype)
    names = ("keys", "values") if "keys" in parts or "values" in parts else _BOTH
    _refuse_missing(parameter, parts, names)
    first, second = (GgmlBlocks(type=parts[name].type.name) for name in names)
    if names == _BOTH:
        return _two(parameter, GateAboveUp(gate=first, up=second), parts, dtype)
    return _two(parameter, LatentHeads(keys=first, values=second), parts, dtype)


def _two(
    name: str,
    encoding: GateAboveUp | Interleaved | LatentHeads,
    parts: Mapping[str, GgufTensor],
    dtype: torch.dtype,
) -> EncodedTensor:
    """Return a weight of two tensors."""
    spans = {part: one.span for part, one in parts.items()}
    shape = encoding.shape(spans)
    return EncodedTensor(
        name=name, shape=shape, dtype=dtype, encoding=encoding, parts=tuple(spans.items())
    )


def _refuse_missing(where: str, parts: Mapping[str, GgufTensor], wanted: tuple[str, ...]) -> None:
    if missing := sorted({*wanted} - parts.keys()):
        raise CheckpointError(
            f"{where} has no {', '.join(missing)}; copy or download the file again"
        )


def _dense(
    family: Family,
    settings: Mapping[str, Any],
    name: str,
    parameter: str,
    one: GgufTensor,
    dtype: torch.dtype,
) -> StoredTensor:
    if family.delta_net:
        moved = family.delta_net == "split"
        found = weight_of(parameter, one, Heads.of(settings), dtype, moved=moved)
        if found is not None:
            return found
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
    experts, number = f"model.layers.{which.layer}.{family.block}.experts", which.number
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
    family: Family,
    settings: Mapping[str, Any],
    stacks: Mapping[tuple[int, str], Mapping[str, GgufTensor]],
    pieces: Mapping[str, Mapping[str, GgufTensor]],
    dtype: torch.dtype,
    known: Container[str],
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the weights that a file has in several tensors, except known ones.

    Some files have the projections of latent attention twice, as one tensor and as two.
    """
    for (layer, suffix), parts in stacks.items():
        join = _in_turn if family.joined == "in_turn" else _above
        yield from join(f"model.layers.{layer}.{family.block}", suffix, parts, dtype)
    for parameter, parts in pieces.items():
        if parameter not in known:
            yield parameter, _of_pieces(settings, parameter, parts, dtype)


def _in_turn(
    block: str, suffix: str, parts: Mapping[str, GgufTensor], dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield stacks as gpt-oss has them: matrices transposed, gate and up in turn."""
    _refuse_missing(f"{block}.experts ({suffix})", parts, (*_BOTH, "down"))
    is_bias = suffix == "bias"
    end = "_bias" if is_bias else ""
    name = f"{block}.experts.down_proj{end}"
    yield name, _weight(name, parts["down"], dtype, transposed=not is_bias)
    gate, up = (GgmlBlocks(type=parts[part].type.name, transposed=not is_bias) for part in _BOTH)
    name = f"{block}.experts.gate_up_proj{end}"
    both = {part: parts[part] for part in _BOTH}
    yield name, _two(name, Interleaved(gate=gate, up=up), both, dtype)


def _above(
    block: str, suffix: str, parts: Mapping[str, GgufTensor], dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield stacks as Granite has them: gate above up."""
    _refuse_missing(f"{block}.experts ({suffix})", parts, (*_BOTH, "down"))
    name = f"{block}.experts.down_proj"
    yield name, _weight(name, parts["down"], dtype)
    gate, up = (GgmlBlocks(type=parts[part].type.name) for part in _BOTH)
    name = f"{block}.experts.gate_up_proj"
    both = {part: parts[part] for part in _BOTH}
    yield name, _two(name, GateAboveUp(gate=gate, up=up), both, dtype)
