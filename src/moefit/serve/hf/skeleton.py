"""Build a transformers model without its experts, and load its dense weights.

The model is built on the meta device, and expert parameters are never materialised. transformers
itself converts and renames the dense weights: it is given a checkpoint and a model without experts.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from moefit.cache_argument import cache_name
from moefit.checkpoint.adapter import Adapter, read_adapter
from moefit.checkpoint.config import (
    config_from,
    read_config,
    refuse_absurd_counts,
    refuse_other_size,
)
from moefit.checkpoint.expert_map import (
    CheckpointMap,
    map_checkpoint,
    parameter_names,
    refuse_parts,
)
from moefit.checkpoint.formats.find import find_weights, part_of
from moefit.checkpoint.gguf.header import read_gguf
from moefit.checkpoint.gguf.settings import settings_of
from moefit.checkpoint.gguf.weights import refuse_left_out, weights_of
from moefit.checkpoint.model_folder import refuse_adapter, settings_file
from moefit.checkpoint.quantisation import refuse_unknown_method
from moefit.checkpoint.safetensors import INDEX, Checkpoint, LazyTensor, read_json
from moefit.checkpoint.sources import ExpertSource
from moefit.dsmoe.model import register
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError, in_brief
from moefit.folders import is_gguf
from moefit.moe.families import MoeBlock
from moefit.moe.layouts import find_blocks
from moefit.quant.format import GroupedFormat
from moefit.serve.hf.dense_groups import DenseGroups, dense_groups
from moefit.serve.hf.held_linear import HeldLinear, HeldLoader, held_linears
from moefit.serve.hf.mtp import make_last_layer_mtp, one_layer_more
from moefit.serve.hf.quant_linear import DenseEncoder, EncodedMatrices, release_weights
from moefit.serve.hf.ties import untie_different

_MAX_COUNT = 2048  # layers or experts; models with more take long to build
_MAX_INDEX_BYTES = 256 << 20  # the largest models have about 10 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormats:
    """How a checkpoint stores a model.

    Attributes:
        experts: Names of the formats of experts: dtypes, or formats of quantised weights.
        dense: Names of the formats of all other weights.
        expert_bytes: Bytes of the largest expert in the files.
        held: Names of the formats of experts whose codes slots hold as they are.
        held_in: The same by block, where a block has such experts.
    """

    experts: tuple[str, ...]
    dense: tuple[str, ...]
    expert_bytes: int
    held: tuple[str, ...] = ()
    held_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "experts": [*self.experts],
            "dense": [*self.dense],
            "expert_bytes": self.expert_bytes,
            "held": [*self.held],
            "held_in": {name: [*formats] for name, formats in self.held_in.items()},
        }


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device and where to find its weights.

    Attributes:
        model: The model on the meta device.
        blocks: Its MoE blocks.
        map: Where each expert's bytes are, and which tensors are dense weights.
        checkpoint: The checkpoint's files.
        dtype: The dtype to compute in.
    """

    model: PreTrainedModel
    blocks: tuple[MoeBlock, ...]
    map: CheckpointMap
    checkpoint: Checkpoint
    dtype: torch.dtype

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Return the tensors of the checkpoint that the model does not load.

        Returns:
            The number of tensors and their bytes by group, such as `mtp` or `model.layers.46`.
        """
        groups: dict[str, tuple[int, int]] = {}
        for name in self.map.unused:
            group = _group(name)
            number, size = groups.get(group, (0, 0))
            groups[group] = number + 1, size + self.checkpoint.weights[name].nbytes
        return groups

    def held_linears(self, device: torch.device) -> dict[str, HeldLinear]:
        """Return the linear layers that can stay in the checkpoint's codes, by name."""
        dense = self.map.dense_weights
        return held_linears(self.model, dense, self.blocks, self.dtype, device)

    def stored(self) -> StoredFormats:
        """Return how the checkpoint stores the weights."""
        sources = [source for some in self.map.experts.values() for source in some]
        return StoredFormats(
            experts=tuple(sorted(frozenset().union(*(one.formats for one in sources)))),
            dense=tuple(sorted({one.format for one in self.map.dense_weights.values()})),
            expert_bytes=max((one.nbytes for one in sources), default=0),
            held=held_formats(self.blocks),
            held_in={one.name: held for one in self.blocks if (held := held_formats([one]))},
        )


def held_formats(blocks: Iterable[MoeBlock]) -> tuple[str, ...]:
    """Return the names of the formats whose codes slots hold as the checkpoint does."""
    specs = (spec for block in blocks for spec in block.layout.specs.values())
    return tuple(sorted({spec.stored.name for spec in specs if spec.stored is not None}))


def _group(name: str) -> str:
    """Return the layer that a tensor belongs to, else the first component of its name.

    >>> _group("model.layers.46.mlp.gate.weight"), _group("mtp.layers.0.fc.weight")
    ('model.layers.46', 'mtp')
    """
    layer = re.match(r"model\.(\w+\.)?layers\.\d+(?=\.)", name)
    return layer[0] if layer else name.partition(".")[0]


def build_skeleton(
    folder: Path,
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
    *,
    needs_experts: bool = True,
    mtp: bool = False,
) -> Skeleton:
    """Read a model's configuration and headers; no weights are read or allocated.

    Args:
        folder: Folder of the checkpoint, or GGUF file.
        dtype: The dtype to compute in; None for the checkpoint's own.
        adapter: Folder of a LoRA adapter to apply to dense weights.
        needs_experts: Refuse a model without experts.
        mtp: Load the layer for multi-token prediction too (`mtp`).

    Raises:
        CheckpointError: The checkpoint or the adapter is incomplete or damaged.
        UnsupportedModelError: The model has no experts that can be served, or is quantised in a
            format that cannot be read.
    """
    if adapter is None:
        refuse_adapter(folder)
    quantisation = refuse_unknown_method(folder)
    register()
    header = read_gguf(folder) if is_gguf(folder) else None
    values = read_config(folder) if header is None else settings_of(header)
    checkpoint = Checkpoint(folder, None if header is None else header.spans)
    refuse_absurd_counts(values, checkpoint)
    if mtp:
        values = one_layer_more(values, checkpoint.spans, folder)
    config = config_from(values, folder)
    compute_dtype = dtype or _own_dtype(config, checkpoint)
    if header is None:
        checkpoint.weights = find_weights(checkpoint.spans, quantisation, compute_dtype)
    else:
        checkpoint.weights = weights_of(header, values, compute_dtype)
    with _config_errors(folder):
        model = _on_meta(config, compute_dtype)
        if mtp:
            make_last_layer_mtp(model)
        cache_name(model)  # raises for a model that takes no KV cache
        refuse_other_size(model, checkpoint)
        blocks = find_blocks(model, needed=needs_experts)
    found = map_checkpoint(model, checkpoint, blocks)
    untie_different(model, found.dense_weights)
    if header is not None:
        refuse_left_out(header, found.unused)
    if adapter is not None:
        found = _adapted(read_adapter(Path(adapter).expanduser()), found, model, blocks)
    blocks = tuple(_as_stored(block, found.experts[block.name]) for block in blocks)
    return Skeleton(model, blocks, found, checkpoint, compute_dtype)


def _adapted(
    adapter: Adapter, found: CheckpointMap, model: PreTrainedModel, blocks: Sequence[MoeBlock]
) -> CheckpointMap:
    """Return the map of a checkpoint with an adapter applied to the dense weights."""
    adapter = adapter.without_tied(model.all_tied_weights_keys)
    sources: dict[str, list[str]] = {}
    for name, parameter in parameter_names(model, found.dense_weights).items():
        sources.setdefault(parameter, []).append(name)

    def find(weight: str) -> str | None:
        if weight in found.dense_weights:
            return weight
        parameter = parameter_names(model, [weight])[weight]
        for block in blocks:
            if parameter.startswith(f"{block.name}.") and parameter not in sources:
                raise UnsupportedModelError(
                    f"{adapter.folder} adapts experts ({weight}), and only adapters of attention "
                    "and other dense weights are applied; merge it with peft and give the merged "
                    "model"
                )
        names = sources.get(parameter, [])
        return names[0] if len(names) == 1 else None

    dense = adapter.applied_to(found.dense_weights, find, model.dtype)
    return replace(found, dense_weights=dense)


def _as_stored(block: MoeBlock, experts: Sequence[ExpertSource]) -> MoeBlock:
    """Return a block whose specs say which matrices slots can hold as the checkpoint does.

    None in float32, where activations of 15 bits and weights that are not rounded to 16 bits, as
    transformers rounds those of integers, would be seen.
    """
    held = [source.held for source in experts]
    turned = [
        short
        for short, spec in block.layout.specs.items()
        if spec.inputs_first and len(spec.shape) == 2
    ]
    if not all((codes := one.get(short)) and codes.transposed for one in held for short in turned):
        held = [{} for _ in held]  # products take such matrices as codes or as values, never both
    specs = {
        short: replace(spec, stored=first)
        if (first := held[0].get(short))
        and spec.dtype.itemsize == 2
        and first.transposed == spec.inputs_first
        and all(one.get(short) == first for one in held)
        else spec
        for short, spec in block.layout.specs.items()
    }
    layout = copy(block.layout)
    layout.specs = specs
    return replace(block, layout=layout)


def refuse_unservable(folder: Path) -> None:
    """Raise an error if a model cannot be served, without its weights (before a download).

    Args:
        folder: Folder with config.json, and the index of shards if there are several.

    Raises:
        CheckpointError: The configuration is missing or damaged.
        UnsupportedModelError: It is an adapter, quantised in a format that cannot be read, or a
            model without servable experts.
    """
    refuse_adapter(folder)
    refuse_unknown_method(folder)
    register()
    config = config_from(read_config(folder), folder)
    if not _is_quick_to_build(config):
        return  # checked against the headers of the weights before it is built
    with _config_errors(folder):
        model = _on_meta(config, torch.float32)
        cache_name(model)
        find_blocks(model)
    refuse_parts(model, folder, _index_names(folder))


def _is_quick_to_build(config: Any) -> bool:
    """Return whether the model can be built in seconds."""
    text = config.get_text_config()
    names = ("num_hidden_layers", "num_layers", "num_experts", "num_local_experts")
    counts = [getattr(text, name, None) for name in (*names, "n_routed_experts")]
    return all(count <= _MAX_COUNT for count in counts if isinstance(count, int | float))


def _index_names(folder: Path) -> list[str]:
    """Return the tensor names of the index of shards; empty if it is missing or damaged."""
    try:
        return list(read_json(folder / INDEX, limit=_MAX_INDEX_BYTES)["weight_map"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []  # reading the shards raises an error with the reason


@dataclass(frozen=True, slots=True)
class DenseForm:
    """How dense weights are held.

    Args:
        format: Encode matrices in this format, in groups that are loaded one after the other.
        packed: Matrices in that format, which are read instead of being encoded.
        held: Without a format, the linear layers that stay in the checkpoint's codes.
    """

    format: GroupedFormat | None = None
    packed: EncodedMatrices | None = None
    held: Mapping[str, HeldLinear] = field(default_factory=dict)


def load_dense_weights(
    skeleton: Skeleton,
    experts: Mapping[str, nn.Module],
    device: torch.device,
    form: DenseForm,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreTrainedModel:
    """Replace the experts by served ones and load all other weights.

    Args:
        skeleton: The model.
        experts: The served experts modules by block name.
        device: The device to load onto.
        form: How they are held.
        progress: Callback with the number of matrices encoded and of all.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: Weights are missing or have another shape, or a packed or held matrix is
            damaged.
    """
    model, blocks, packed = skeleton.model, skeleton.blocks, form.packed
    if form.format is None:
        _replace_experts(skeleton, experts)
        loader = HeldLoader(model, form.held, skeleton.checkpoint)
        groups = loader.groups(skeleton.map.dense_weights)
        _load_in_groups(skeleton, device, groups, loader.read)
        loader.place()
        return model.eval()
    groups = _groups_of(skeleton, () if packed is None else packed.names)
    _replace_experts(skeleton, experts)
    encoder = DenseEncoder(model, form.format, blocks, device, progress, packed)
    _load_in_groups(skeleton, device, groups, encoder.encode)
    encoder.encode()
    encoder.place()
    return model.eval()


def visit_dense_weights(
    skeleton: Skeleton,
    use: Callable[[Tensor, Mapping[str, nn.Module]], None],
    done: Collection[str] = (),
) -> None:
    """Load the weights that can be encoded, some at a time, and free each after it was used.

    Args:
        skeleton: The model, which is of no further use.
        use: Takes a weight, and the modules that use it by name.
        done: Names as in `EncodedMatrices`, of modules for which `use` is not called; their weights
            are not loaded if that can be avoided.

    Raises:
        CheckpointError: Weights are missing or have another shape.
    """
    groups = _groups_of(skeleton, done)
    _replace_experts(skeleton, {block.name: nn.Module() for block in skeleton.blocks})

    def visit(weight: Tensor, owners: Mapping[str, nn.Module]) -> None:
        if next(iter(owners)) not in done:
            use(weight, owners)

    release = partial(release_weights, skeleton.model, skeleton.blocks, visit)
    _load_in_groups(skeleton, torch.device("cpu"), groups, release)
    release()


def _groups_of(skeleton: Skeleton, encoded: Collection[str]) -> DenseGroups:
    dense = skeleton.map.dense_weights
    return dense_groups(skeleton.model, dense, skeleton.blocks, skeleton.dtype, encoded)


def _load_in_groups(
    skeleton: Skeleton,
    device: torch.device,
    groups: DenseGroups,
    encode: Callable[[Collection[str]], None],
) -> None:
    """Load dense weights; `encode` takes the names of each group's modules once it is loaded."""
    model = skeleton.model
    conversions = get_model_conversion_mapping(model)
    dense = skeleton.map.dense_weights
    lazy = {
        name: LazyTensor(skeleton.checkpoint, stored)
        for name, stored in dense.items()
        if name not in groups.skipped
    }
    plan = LoadStateDictConfig(
        device_map={"": device},
        ignore_mismatched_sizes=True,  # raised below, with names
        dtype=skeleton.dtype,
        dtype_plan=model._get_dtype_plan(skeleton.dtype),
        weight_mapping=cast(Any, conversions),
    )
    loader = type(model)
    for group in groups.groups:
        if part := {name: lazy.pop(name) for name in group.sources}:
            loader._load_pretrained_model(model, cast(Any, part), None, plan)
        encode(group.modules)
        for name in group.modules:  # T5's initialisation accesses the weights of its children
            if parent := name.rpartition(".")[0]:
                _skip_initialisation(model.get_submodule(parent))
    _forget_missing_ties(model)
    info, _ = loader._load_pretrained_model(model, cast(Any, lazy), None, plan)
    info = loader._finalize_model_loading(model, plan, info)
    _refuse_missing(info, loader.__name__)


def _replace_experts(skeleton: Skeleton, experts: Mapping[str, nn.Module]) -> None:
    """Put the served experts modules in the model."""
    model = skeleton.model
    for block in skeleton.blocks:
        served = experts[block.name]
        for name, module in _shared_modules(model, block).items():
            served.add_module(name, module)
        model.set_submodule(block.name, block.around(served))
        _skip_initialisation(model.get_submodule(block.parent))
    _forget_missing_ties(model)


def _refuse_missing(info: Any, family: str) -> None:
    """Raise CheckpointError if the loader found weights missing or in another shape."""
    if info.missing_keys or info.mismatched_keys or info.conversion_errors:
        names = [*info.missing_keys, *map(str, info.mismatched_keys), *info.conversion_errors]
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} weights that {family} needs, or has them in "
            f"another shape: {', '.join(sorted(names)[:3])}; copy or download it again"
        )


def _forget_missing_ties(model: PreTrainedModel) -> None:
    """Untie parameters that are gone: of experts that two blocks share, which each block loads,
    and of tied matrices that are encoded already."""
    existing = set(model.state_dict())
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {
        target: source for target, source in tied if target in existing and source in existing
    }


def _shared_modules(model: PreTrainedModel, block: MoeBlock) -> dict[str, nn.Module]:
    """Return submodules that all experts of a block share, such as a norm; these stay loaded."""
    if block.shell is not None:
        return {}
    layout = block.layout
    own = {
        layout.parameter(short, expert)[0].partition(".")[0]
        for short in layout.specs
        for expert in range(block.num_experts)
    }
    children = model.get_submodule(block.name).named_children()
    return {name: module for name, module in children if name not in own}


def _skip_initialisation(parent: nn.Module) -> None:
    """Prevent transformers from initialising a module with random numbers before loading.

    The initialisation of some families accesses parameters of experts or of encoded layers, which
    are gone. Modules with buffers that are not in the checkpoint do need it.
    """
    if not any(module._non_persistent_buffers_set for module in parent.modules()):
        cast(Any, parent)._is_hf_initialized = True


def _on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=dtype).eval()


@contextmanager
def _config_errors(folder: Path) -> Iterator[None]:
    """Turn exceptions of a family's code into a CheckpointError about config.json."""
    try:
        yield
    except MoefitError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{settings_file(folder)} describes a model that cannot be built: {in_brief(error)}; "
            "use the settings that belong to the weights"
        ) from error


def _model_class(config: Any) -> type[PreTrainedModel]:
    """Return the class in `architectures`, else the family's class for text generation."""
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    try:
        return cast(type[PreTrainedModel], auto._model_mapping[type(config)])
    except KeyError as error:
        raise UnsupportedModelError(
            f"transformers has no language model for {type(config).__name__}; give a text "
            "generation model"
        ) from error


def _own_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    floating = [
        span.dtype
        for name, span in checkpoint.spans.items()
        if span.dtype.is_floating_point and span.dtype.itemsize > 1 and part_of(name) is None
    ]
    return floating[0] if floating else torch.bfloat16
