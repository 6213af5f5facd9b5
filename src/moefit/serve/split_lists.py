"""Checkpoint lists of which a rule makes several parameters: which part of a list is whose.

Owns the finding out. The rule is run on labels in place of matrices, one number each; where a
number comes out, its matrix goes. Takes transformers' rule and a list's length per source pattern;
gives, per parameter, the positions in the lists. Reads nothing.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from moefit.errors import CheckpointError, UnsupportedModelError


def positions(
    converter: WeightConverter, target: str, lengths: Mapping[str, int], config: Any
) -> dict[str, list[int]]:
    """Per full parameter name, the positions of its experts in each of the lists, in order.

    Raises CheckpointError for lists of different lengths, UnsupportedModelError if the rule does
    more than divide, stack and concatenate.
    """
    if set(lengths) != set(converter.source_patterns) or len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{target} is made of {', '.join(converter.source_patterns)}, as many of each, but the "
            f"checkpoint has {dict(lengths)}; copy or download it again"
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
    """The rule for one of the parameters: stack its part of each list, concatenate the stacks."""
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
        f"{name}: transformers makes it of a list that other parameters are made of too, and not "
        "by dividing it; its experts cannot be read one by one"
    )
