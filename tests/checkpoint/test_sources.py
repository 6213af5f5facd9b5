from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from moefit.checkpoint.safetensors import SINGLE, Checkpoint
from moefit.checkpoint.sources import ByteRange, CompositeSource, Conversion
from moefit.errors import UnsupportedModelError
from moefit.moe.families import TensorSpec

GATE, UP = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12).view(2, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({"gate": GATE, "up": UP}, tmp_path / SINGLE)
    return Checkpoint(tmp_path)


def stacked(checkpoint: Checkpoint) -> Conversion:
    """Concatenate gate and up as transformers does for lists of experts."""
    return Conversion(
        tensor="gate_up_proj",
        target="experts.gate_up_proj",
        spec=TensorSpec((4, 3), torch.bfloat16),
        converter=WeightConverter(
            ["gate", "up"], "experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]
        ),
        sources=tuple((name, (checkpoint.spans[name],)) for name in ("gate", "up")),
        config=None,
    )


def plain(checkpoint: Checkpoint) -> Conversion:
    return replace(
        stacked(checkpoint),
        spec=TensorSpec((2, 3), torch.float64),
        converter=None,
        sources=(("gate", (checkpoint.spans["gate"],)),),
    )


def test_conversion_equals_transformers(checkpoint: Checkpoint) -> None:
    recipe = stacked(checkpoint)
    for _ in range(2):  # and is not used up
        assert torch.equal(recipe.materialize(checkpoint), torch.cat([GATE, UP]).bfloat16())
    assert recipe.nbytes == 2 * 6 * 4 and len(recipe.spans) == 2


def test_conversion_without_operations_changes_dtype(checkpoint: Checkpoint) -> None:
    assert torch.equal(plain(checkpoint).materialize(checkpoint), GATE.double())


def test_other_shape_raises(checkpoint: Checkpoint) -> None:
    recipe = replace(plain(checkpoint), spec=TensorSpec((3, 2), torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"becomes \[2, 3\].*computes with \[3, 2\]"):
        recipe.materialize(checkpoint)


def test_expert_bytes_include_all_parts(checkpoint: Checkpoint) -> None:
    piece = ByteRange(tensor="gate", start=0, span=checkpoint.spans["gate"])
    assert CompositeSource((piece,)).nbytes == 24
    assert CompositeSource((piece, stacked(checkpoint))).nbytes == 24 + 48
