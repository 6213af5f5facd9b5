"""A model without its experts: built on the meta device, its other weights read by name.

Owns the way from a folder to a module tree whose experts never were in memory. transformers does
the naming and converting; it sees a checkpoint from which the experts are absent, and a model that
doesn't have them. Knows nothing of slots or budgets.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from moefit.checkpoint.config import (
    CONFIG,
    config_from,
    read_config,
    refuse_absurd_counts,
    refuse_other_size,
)
from moefit.checkpoint.expert_map import CheckpointMap, map_checkpoint, refuse_parts
from moefit.checkpoint.model_folder import refuse_adapter
from moefit.checkpoint.quantisation import refuse_declared
from moefit.checkpoint.safetensors import INDEX, Checkpoint, LazyTensor, read_json
from moefit.dsmoe.model import register
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError, in_brief
from moefit.moe.families import MoeBlock
from moefit.moe.layouts import find_blocks

_MANY = 2048  # layers or experts; more take long to build
_MAX_INDEX = 256 << 20  # bytes; the largest models have some 10 MB


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, where its experts are, and where their bytes are."""

    model: PreTrainedModel
    blocks: tuple[MoeBlock, ...]
    map: CheckpointMap
    checkpoint: Checkpoint
    dtype: torch.dtype

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Return what the checkpoint has and the model does not load.

        Returns:
            By group, such as `mtp` or `model.layers.46`, the number of tensors and their bytes.
        """
        groups: dict[str, tuple[int, int]] = {}
        for name in self.map.left_out:
            group = _group(name)
            number, size = groups.get(group, (0, 0))
            groups[group] = number + 1, size + self.checkpoint.spans[name].nbytes
        return groups


def _group(name: str) -> str:
    """What a tensor that is left out belongs to: a layer of the model, else its first part.

    >>> _group("model.layers.46.mlp.gate.weight"), _group("mtp.layers.0.fc.weight")
    ('model.layers.46', 'mtp')
    """
    layer = re.match(r"model\.(\w+\.)?layers\.\d+(?=\.)", name)
    return layer[0] if layer else name.partition(".")[0]


def build_skeleton(folder: Path, dtype: torch.dtype | None = None) -> Skeleton:
    """Read configuration and headers; allocate nothing. `dtype` None is the checkpoint's own.

    Raises CheckpointError for a folder that is no whole checkpoint, UnsupportedModelError for a
    model without experts that can be served, or quantised.
    """
    refuse_adapter(folder)
    refuse_declared(folder)
    register()
    values = read_config(folder)
    checkpoint = Checkpoint(folder)
    refuse_absurd_counts(values, checkpoint)
    config = config_from(values, folder)
    chosen = dtype or _own_dtype(config, checkpoint)
    with _blaming_config(folder):
        model = _on_meta(config, chosen)
        refuse_other_size(model, checkpoint)
        blocks = find_blocks(model)
    return Skeleton(model, blocks, map_checkpoint(model, checkpoint, blocks), checkpoint, chosen)


def refuse_unservable(folder: Path) -> None:
    """Refuse what can be known to be unservable without weights, before they are downloaded.

    Args:
        folder: A model's configuration, and the index of its shards if it has several.

    Raises:
        CheckpointError: The configuration is missing or damaged.
        UnsupportedModelError: It is an adapter, quantised, or a model without servable experts.
    """
    refuse_adapter(folder)
    refuse_declared(folder)
    register()
    config = config_from(read_config(folder), folder)
    if not _plausible(config):
        return  # compared with the files' headers before it is built, as far as it comes
    with _blaming_config(folder):
        model = _on_meta(config, torch.float32)
        find_blocks(model)
    refuse_parts(model, folder, _indexed(folder))


def _plausible(config: Any) -> bool:
    """Whether building the model takes seconds at most."""
    text = config.get_text_config()
    names = ("num_hidden_layers", "num_layers", "num_experts", "num_local_experts")
    counts = [getattr(text, name, None) for name in (*names, "n_routed_experts")]
    return all(count <= _MANY for count in counts if isinstance(count, int | float))


def _indexed(folder: Path) -> list[str]:
    """The tensors that the index of shards names; none without one, or where it is damaged."""
    try:
        return list(read_json(folder / INDEX, limit=_MAX_INDEX)["weight_map"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []  # whoever reads the shards says what is wrong with it


def load_dense_weights(
    skeleton: Skeleton, experts: Mapping[str, nn.Module], device: torch.device
) -> PreTrainedModel:
    """Put these modules in place of the experts, and load all other weights onto `device`.

    Raises CheckpointError if the model needs weights that the checkpoint lacks.
    """
    model = skeleton.model
    conversions = get_model_conversion_mapping(model)
    for block in skeleton.blocks:
        served = experts[block.name]
        for name, module in _shared_modules(model, block).items():
            served.add_module(name, module)
        model.set_submodule(block.name, block.around(served))
        _leave_uninitialised(model.get_submodule(block.parent))
    _forget_tied_experts(model)
    lazy = {
        name: LazyTensor(skeleton.checkpoint, skeleton.checkpoint.spans[name])
        for name in skeleton.map.rest
    }
    plan = LoadStateDictConfig(
        device_map={"": device},
        ignore_mismatched_sizes=True,  # refused below, by name
        dtype=skeleton.dtype,
        dtype_plan=model._get_dtype_plan(skeleton.dtype),
        weight_mapping=cast(Any, conversions),
    )
    loader = type(model)
    found, _ = loader._load_pretrained_model(model, cast(Any, lazy), None, plan)
    found = loader._finalize_model_loading(model, plan, found)
    if found.missing_keys or found.mismatched_keys or found.conversion_errors:
        names = [*found.missing_keys, *map(str, found.mismatched_keys), *found.conversion_errors]
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} weights that {loader.__name__} needs, or has them "
            f"in another shape: {', '.join(sorted(names)[:3])}; copy or download it again"
        )
    return model.eval()


def _forget_tied_experts(model: PreTrainedModel) -> None:
    """Two blocks with the same experts each read them; the parameters to be tied are gone."""
    there = set(model.state_dict())
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {to: by for to, by in tied if to in there and by in there}


def _shared_modules(model: PreTrainedModel, block: MoeBlock) -> dict[str, nn.Module]:
    """What all experts of a block share, such as a norm behind each of them: it stays loaded."""
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


def _leave_uninitialised(parent: nn.Module) -> None:
    """Keep transformers from filling a block with random numbers before its weights are loaded.

    Some families' way to do so reaches into the experts. Buffers that no checkpoint has do need it.
    """
    if not any(module._non_persistent_buffers_set for module in parent.modules()):
        cast(Any, parent)._is_hf_initialized = True


def _on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=dtype).eval()


@contextmanager
def _blaming_config(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for whatever a family's code does with numbers it does not expect."""
    try:
        yield
    except MoefitError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes no model that can be built: {in_brief(error)}; give the "
            "config.json that belongs to the weights"
        ) from error


def _model_class(config: Any) -> type[PreTrainedModel]:
    """The class that the checkpoint names, else the one for text of its family."""
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
            f"transformers has no language model for {type(config).__name__}"
        ) from error


def _own_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    floating = [span.dtype for span in checkpoint.spans.values() if span.dtype.is_floating_point]
    return floating[0] if floating else torch.float32
