"""Find the source of each expert in a checkpoint.

Inverts transformers' weight-conversion mapping over the headers of the files: the result for each
expert is the byte ranges that make up its tensors, or the conversions that produce them. Some
checkpoints store lists of tensors from which one rule makes several parameters; `positions` returns
which entries of such a list belong to which parameter. No weights are read.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moefit.checkpoint.formats.encoding import EncodedTensor
from moefit.checkpoint.formats.find import part_of
from moefit.checkpoint.quantisation import refuse_integers, refuse_scales, sign_of
from moefit.checkpoint.safetensors import Checkpoint, Span, StoredTensor, value_bytes
from moefit.checkpoint.sources import (
    ByteRange,
    CompositeSource,
    Conversion,
    DecodedRange,
    ExpertSource,
)
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.moe.families import MoeBlock, TensorSpec

# What only layers that predict further tokens (MTP) have: DeepSeek-V3's and GLM's names.
_OF_GGUF = " (a GGUF file's is in its metadata: convert or download that again)"
_PREDICTS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")


def positions(
    converter: WeightConverter, target: str, lengths: Mapping[str, int], config: Any
) -> dict[str, list[int]]:
    """Return, per full parameter name, the positions of its experts in each source list.

    Args:
        converter: A rule that makes several parameters from lists of tensors.
        target: Full name of one of the parameters.
        lengths: Length of the list for each source pattern.
        config: The model's configuration, which some operations read.

    Raises:
        CheckpointError: The lists differ in length.
        UnsupportedModelError: The rule does more than divide, stack and concatenate.
    """
    if set(lengths) != set(converter.source_patterns) or len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{target} is made from equally many of {', '.join(converter.source_patterns)}, but "
            f"the checkpoint has {dict(lengths)}; copy or download it again"
        )
    rule = deepcopy(converter)
    step = max(lengths.values())
    for number, pattern in enumerate(rule.source_patterns):
        labels = [torch.full((1, 1), number * step + at) for at in range(step)]
        rule.collected_tensors[pattern] = cast(Any, labels)
    try:
        made = rule.convert(target, model=cast(Any, None), config=config, loading_info=None)
    except Exception as error:
        raise UnsupportedModelError(_refusal(target)) from error
    return {
        name: _rows(cast(Tensor, value), len(rule.source_patterns), step, name)
        for name, value in made.items()
    }


def stacking(converter: WeightConverter, target: str) -> WeightConverter:
    """Return a rule for one parameter: stack its part of each list, concatenate the stacks."""
    concatenate = [Concatenate(dim=1)] if len(converter.source_patterns) > 1 else []
    return WeightConverter(
        source_patterns=list(converter.source_patterns),
        target_patterns=[target],
        operations=[MergeModulelist(dim=0), *concatenate],
    )


def _rows(labels: Tensor, patterns: int, step: int, name: str) -> list[int]:
    rows = labels[:, 0, 0].tolist() if labels.dim() == 3 else []
    expected = [[[row + number * step] for number in range(patterns)] for row in rows]
    if not rows or labels.tolist() != expected:
        raise UnsupportedModelError(_refusal(name))
    return rows


def _refusal(name: str) -> str:
    return (
        f"{name}: transformers makes several parameters from one list, but not by dividing it; its "
        "experts cannot be read one by one"
    )


@dataclass(slots=True)
class _Collected:
    """The checkpoint tensors for one parameter of the model."""

    converter: WeightConverter | None = None
    stored: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMap:
    """Location of a model's weights in its checkpoint.

    Attributes:
        experts: The source of each expert, by block name.
        dense_weights: The other tensors that the model loads, by name.
        unused: Names of tensors that the model does not load, such as those of multi-token
            prediction layers (MTP).
    """

    experts: Mapping[str, tuple[ExpertSource, ...]]
    dense_weights: Mapping[str, StoredTensor]
    unused: tuple[str, ...] = ()


def map_checkpoint(
    model: PreTrainedModel, checkpoint: Checkpoint, blocks: Sequence[MoeBlock]
) -> CheckpointMap:
    """Find the sources of all experts of a model.

    Args:
        model: On the meta device, with its own experts modules.
        checkpoint: Its checkpoint.
        blocks: Its MoE blocks.

    Raises:
        CheckpointError: The checkpoint lacks an expert, or has it in another shape.
        UnsupportedModelError: A rule does more to a list than divide and stack it, or the
            checkpoint is quantised.
    """
    owners = {name: block for block in blocks for name in _parameter_names(block)}
    names = _Names.of(model)
    collected, dense_weights, unused = _collect(names, checkpoint, owners)
    refuse_scales(checkpoint.folder, names.scales(unused))
    divided = dict(_divide(collected, model.config))
    checked: set[Any] = set()
    experts = {
        block.name: tuple(
            _source(block, expert, divided, model, checked) for expert in range(block.num_experts)
        )
        for block in blocks
    }
    names.refuse_other_shapes(dense_weights)
    names.refuse_unused(checkpoint, unused, model.config.get_text_config(decoder=True))
    return CheckpointMap(experts=experts, dense_weights=dense_weights, unused=tuple(unused))


def parameter_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Return the name of the parameter that each tensor of a checkpoint fills.

    Args:
        model: On the meta device, with its own experts modules.
        tensors: Names in the checkpoint, such as `CheckpointMap.dense_weights`.
    """
    names = _Names.of(model)
    return {name: names.target(name)[0] for name in tensors}


def direct_sources(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Return the tensor of each parameter that is loaded from one tensor, without a rule.

    Args:
        model: On the meta device, with its own experts modules.
        tensors: Names in the checkpoint, such as `CheckpointMap.dense_weights`.
    """
    names = _Names.of(model)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in tensors:
        target, pattern = names.target(name)
        found.setdefault(target, []).append((name, pattern))
    return {
        target: sources[0][0]
        for target, sources in found.items()
        if len(sources) == 1 and sources[0][1] is None
    }


def refuse_parts(model: PreTrainedModel, folder: Path, tensors: Iterable[str]) -> None:
    """Refuse a checkpoint that has parts of quantised weights of an unknown format, by name alone.

    Args:
        model: On the meta device.
        folder: Where the checkpoint is, or will be.
        tensors: The names of its tensors.

    Raises:
        UnsupportedModelError: There are such tensors.
    """
    names = _Names.of(model)
    unused = (name for name in tensors if sign_of(name) is not None and part_of(name) is None)
    refuse_scales(
        folder, names.scales(name for name in unused if names.target(name)[0] not in names.expected)
    )


def _parameter_names(block: MoeBlock) -> list[str]:
    layout = block.layout
    return sorted(
        {
            f"{block.name}.{layout.parameter(short, expert)[0]}"
            for short in layout.specs
            for expert in range(block.num_experts)
        }
    )


@dataclass(frozen=True, slots=True)
class _Names:
    """Map names of checkpoint tensors to parameters as transformers' loader does."""

    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    expected: Mapping[str, Tensor]
    ignored: tuple[str, ...]
    float32: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Names":
        mapping = get_model_conversion_mapping(model)
        return cls(
            renamings=[rule for rule in mapping if isinstance(rule, WeightRenaming)],
            converters=[rule for rule in mapping if isinstance(rule, WeightConverter)],
            prefix=model.base_model_prefix,
            expected=model.state_dict(),
            ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
            float32=tuple(model._get_dtype_plan(model.dtype)),
        )

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter's name, and the source pattern of the rule that makes it, if any."""
        expected = cast(dict[str, Tensor], self.expected)
        found = rename_source_key(name, self.renamings, self.converters, self.prefix, expected)
        if found[0] not in expected and name in expected:
            return rename_source_key(name, [], [], self.prefix, expected)
        return found

    def in_its_dtype(self, stored: StoredTensor, target: str) -> StoredTensor:
        """Return a quantised weight with values in the dtype that the model loads it in."""
        if not isinstance(stored, EncodedTensor):
            return stored
        stored.check()
        kept = any(re.search(pattern.replace("*", r"\d+"), target) for pattern in self.float32)
        return replace(stored, dtype=torch.float32 if kept else self.expected[target].dtype)

    def refuse_other_shapes(self, dense_weights: Mapping[str, StoredTensor]) -> None:
        """Raise CheckpointError if tensors without a rule have other shapes than the model.

        transformers would first allocate the model's tensors, which may have any size.
        """
        differing: list[str] = []
        for name, stored in dense_weights.items():
            target, pattern = self.target(name)
            shape, wanted = stored.shape, tuple(self.expected[target].shape)
            if pattern is None and shape != wanted:
                differing.append(f"{name} is {list(shape)}, not {list(wanted)}")
        if differing:
            raise CheckpointError(
                f"{len(differing)} weights have another shape than config.json says: "
                f"{'; '.join(differing[:3])}; give the config.json that belongs to them{_OF_GGUF}"
            )

    def refuse_unused(self, checkpoint: Checkpoint, unused: Sequence[str], config: Any) -> None:
        """Raise CheckpointError if config.json omits weights that change the model's outputs.

        These are layers after the model's last one, unless they are for multi-token prediction
        (MTP), and biases of weights that are loaded. GPTQ gives every weight one, of zeros.
        """
        loaded = checkpoint.weights.keys() - set(unused)
        layers = {layer for name in loaded if (layer := _layer(name)) is not None}
        suffixes = {suffix for _, _, suffix in layers}
        last = _last_layers(layers)
        num_mtp_layers = getattr(config, "num_nextn_predict_layers", None) or 0
        found = [(name, _layer(name)) for name in unused if not self._ignores(name)]
        mtp_layers = {layer[:2] for name, layer in found if layer and _PREDICTS.search(name)}
        missing = [
            name
            for name, layer in found
            if layer
            and layer[2] in suffixes
            and layer[:2] not in mtp_layers
            and layer[1] > last.get(layer[0], layer[1]) + num_mtp_layers
        ]
        missing += [
            name
            for name, _ in found
            if name.endswith(".bias")
            and (weight := f"{name.removesuffix('bias')}weight") in loaded
            and not (
                isinstance(checkpoint.weights[weight], EncodedTensor) and _is_zero(checkpoint, name)
            )
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint has {len(missing)} weights that its config.json leaves out, "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, and the model "
                "would answer otherwise without them; give the config.json that belongs to "
                f"it{_OF_GGUF}"
            )

    def scales(self, unused: Iterable[str]) -> Iterator[str]:
        """Yield the unused tensors that belong to a quantised weight of this model."""
        modules = {name.rpartition(".")[0] for name in self.expected}
        for name in unused:
            if (sign := sign_of(name)) is None or self._ignores(name):
                continue
            weights = (sign[0], f"{sign[0]}.weight")
            in_module = self.target(name)[0].rpartition(".")[0] in modules
            if in_module or any(self.target(one)[0] in self.expected for one in weights):
                yield name

    def _ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    return not bool(checkpoint.tensor(checkpoint.weights[name]).any())


def _last_layers(layers: Iterable[tuple[str, int, str]]) -> dict[str, int]:
    """Return the highest number after each part of a name, in one pass: models have 100,000 names.

    >>> _last_layers([("model.layers", 3, "norm.weight"), ("model.layers", 11, "norm.weight")])
    {'model.layers': 11}
    """
    last: dict[str, int] = {}
    for before, number, _ in layers:
        last[before] = max(number, last.get(before, number))
    return last


def _layer(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name into the part before a layer's number, the number, and the rest.

    >>> _layer("model.layers.3.mlp.experts.7.w1.weight")
    ('model.layers', 3, 'mlp.experts.7.w1.weight')
    """
    found = re.match(r"(.*?)\.(\d{1,9})\.(.+)$", name)
    return (found[1], int(found[2]), found[3]) if found else None


def _collect(
    names: _Names, checkpoint: Checkpoint, owners: Mapping[str, MoeBlock]
) -> tuple[dict[str, _Collected], dict[str, StoredTensor], list[str]]:
    """Return the tensors of each expert parameter, dense ones, and names of unused ones."""
    by_pattern = {pattern: rule for rule in names.converters for pattern in rule.source_patterns}
    collected: dict[str, _Collected] = {}
    dense_weights: dict[str, StoredTensor] = {}
    unused: list[str] = []
    for name in sorted(checkpoint.weights, key=dot_natural_key):
        target, pattern = names.target(name)
        if target not in names.expected:
            unused.append(name)
            continue
        stored = names.in_its_dtype(checkpoint.weights[name], target)
        if names.expected[target].is_floating_point():
            refuse_integers(stored, target)
        if target not in owners:
            dense_weights[name] = stored
            continue
        entry = collected.setdefault(target, _Collected())
        if pattern is not None:
            entry.converter = by_pattern[pattern]
        entry.stored[pattern or name].append(stored)
    return collected, dense_weights, unused


def _divide(collected: Mapping[str, _Collected], config: Any) -> Iterator[tuple[str, _Collected]]:
    """Yield one entry per parameter where a rule makes several from one list."""
    for target, entry in collected.items():
        rule = entry.converter
        if rule is None or len(rule.target_patterns) == 1:
            yield target, entry
            continue
        lengths = {pattern: len(group) for pattern, group in entry.stored.items()}
        for name, rows in positions(rule, target, lengths, config).items():
            part = {
                pattern: [group[row] for row in rows] for pattern, group in entry.stored.items()
            }
            yield name, _Collected(stacking(rule, name), part)


def _source(
    block: MoeBlock,
    expert: int,
    collected: Mapping[str, _Collected],
    model: PreTrainedModel,
    checked: set[Any],
) -> ExpertSource:
    """Return one expert's source; `checked` holds keys of conversions whose shapes are valid."""
    parts: list[ExpertSource] = []
    for short, spec in block.layout.specs.items():
        below, row = block.layout.parameter(short, expert)
        target = f"{block.name}.{below}"
        if target not in collected:  # tied to the experts of another block
            target = model.all_tied_weights_keys.get(target, target)
        if target not in collected:
            raise CheckpointError(
                f"the checkpoint has no tensor for {target} of {type(model).__name__}; it is "
                f"incomplete, or of another model than its config.json says{_OF_GGUF}"
            )
        entry = collected[target]
        rows = model.get_parameter(target).shape[0] if row is not None else block.num_experts
        sources = _of_expert(entry, row, (block.num_experts, rows), target)
        ranges = _byte_ranges(short, spec, entry.converter, sources, stacked=row is not None)
        if ranges:
            parts.extend(ranges)
            continue
        conversion = Conversion(
            tensor=short,
            target=target,
            spec=spec,
            converter=entry.converter,
            sources=tuple(sources.items()),
            config=model.config,
        )
        if (key := (conversion.shape_key, block.name)) not in checked:
            conversion.check_shape()
            checked.add(key)
        parts.append(conversion)
    return CompositeSource(tuple(parts))


def _of_expert(
    entry: _Collected, row: int | None, counts: tuple[int, int], target: str
) -> dict[str, tuple[StoredTensor, ...]]:
    """Return the tensors of one expert: an entry of a list, or some rows of a stacked tensor.

    Args:
        entry: The tensors of all experts.
        row: The expert; None if the tensors are its own.
        counts: The number of experts, and of rows of the model's parameter: those of LongCat-Flash
            are more, of DBRX several for each expert.
        target: The parameter, for errors.
    """
    if row is None:
        return {pattern: tuple(group) for pattern, group in entry.stored.items()}
    sources: dict[str, tuple[StoredTensor, ...]] = {}
    operations = entry.converter.operations if entry.converter else [None]
    num_experts, num_rows = counts
    is_list = num_experts > 1 or isinstance(operations[0], MergeModulelist)
    for pattern, group in entry.stored.items():
        first = group[0]
        if len(group) in counts and is_list:
            sources[pattern] = (group[row],)
        elif len(group) == 1 and first.shape[:1] == (num_experts,):
            one = first.row(row)
            sources[pattern] = (one.in_stack() if entry.converter else one,)
        elif len(group) == 1 and first.shape[:1] == (num_rows,) and isinstance(first, Span):
            sources[pattern] = (first.part(row, num_experts),)
        else:
            raise CheckpointError(
                f"{target} needs {num_experts} experts, but the checkpoint has {len(group)} "
                f"tensors of shape {list(first.shape)} for it ({first.name}, ...)"
            )
    return sources


def _byte_ranges(
    short: str,
    spec: TensorSpec,
    converter: WeightConverter | None,
    sources: Mapping[str, tuple[StoredTensor, ...]],
    *,
    stacked: bool,
) -> list[ExpertSource]:
    """Return the tensor as ranges that are filled in place; empty if it needs a conversion."""
    if converter is None:
        stored = [one for group in sources.values() for one in group]
    elif stacked and _only_stacks(converter):
        stored = [s for pattern in converter.source_patterns for s in sources.get(pattern, ())]
        if any(one.shape[1:] != spec.shape[1:] for one in stored):
            return []
    else:
        return []
    if any(one.dtype != spec.dtype for one in stored):
        return []
    if len(stored) == 1 and stored[0].shape != spec.shape:
        return []
    if sum(map(value_bytes, stored)) != spec.nbytes:
        return []
    ranges: list[ExpertSource] = []
    start = 0
    for one in stored:
        if isinstance(one, EncodedTensor):
            ranges.append(DecodedRange(tensor=short, start=start, weight=one))
        elif isinstance(one, Span):
            ranges.append(ByteRange(tensor=short, start=start, span=one))
        start += value_bytes(one)
    return ranges


def _only_stacks(converter: WeightConverter) -> bool:
    """Return whether a rule stacks experts, and parts of an expert, along the first axis only."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
        case _:
            return False
