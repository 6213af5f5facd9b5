"""One list of tensors for several parameters, found by running the conversion on labels."""

import pytest
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
)

from moefit.checkpoint.expert_map import positions, stacking
from moefit.errors import CheckpointError, UnsupportedModelError

GATE, UP = "experts.*.gate_proj.weight", "experts.*.up_proj.weight"
TEXT, VISION = "text.experts.gate_up_proj", "vision.experts.gate_up_proj"
TARGET = f"model.layers.3.{TEXT}"


def rule(*operations) -> WeightConverter:
    return WeightConverter(
        source_patterns=[GATE, UP], target_patterns=[TEXT, VISION], operations=list(operations)
    )


def test_each_parameter_gets_its_tensors():
    found = positions(
        rule(ErnieFuseAndSplitTextVisionExperts()), TARGET, {GATE: 6, UP: 6}, config=None
    )
    assert found == {TARGET: [0, 1, 2], TARGET.replace(TEXT, VISION): [3, 4, 5]}


def test_conversion_rule_is_reusable():
    ernie = rule(ErnieFuseAndSplitTextVisionExperts())
    for _ in range(2):
        positions(ernie, TARGET, {GATE: 4, UP: 4}, config=None)
    assert not ernie.collected_tensors


@pytest.mark.parametrize("dim", [1, 2])
def test_unsupported_conversion_raises(dim):
    """Either parameter would get a part of each expert."""
    operations = [MergeModulelist(dim=0), Chunk(dim=dim)]
    divides_width = WeightConverter(
        source_patterns=[GATE], target_patterns=[TEXT, VISION], operations=operations
    )
    with pytest.raises(UnsupportedModelError, match="cannot be read one by one"):
        positions(divides_width, TARGET, {GATE: 4}, config=None)


@pytest.mark.parametrize("lengths", [{GATE: 4, UP: 3}, {GATE: 4}])
def test_incomplete_checkpoint_raises(lengths):
    with pytest.raises(CheckpointError, match="equally many of"):
        positions(rule(ErnieFuseAndSplitTextVisionExperts()), TARGET, lengths, config=None)


def test_stacking_of_one_parameter():
    alone = stacking(rule(ErnieFuseAndSplitTextVisionExperts()), VISION)
    assert alone.source_patterns == [GATE, UP]
    assert alone.target_patterns == [VISION]
    assert [type(one) for one in alone.operations] == [MergeModulelist, Concatenate]
