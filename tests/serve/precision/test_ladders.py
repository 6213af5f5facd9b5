from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_served import saved, tiny

from moefit.quant.format import parse_format
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.packed.build import pack
from moefit.serve.packed.store import open_packed
from moefit.serve.precision.allocate import (
    AUTO_FORMATS,
    FormatChoice,
    by_expert,
    initial_choices,
    ladders_of,
)

pytestmark = pytest.mark.usefixtures("packed_cache")
LADDER = tuple(
    FormatChoice(format=name, nbytes=nbytes, error=error)
    for name, nbytes, error in [("int2", 20, 0.5), ("int4", 40, 0.1), ("native", 160, 0.0)]
)


def test_unpacked_errors_are_expected_errors(tmp_path: Path) -> None:
    skeleton = build_skeleton(
        saved(tiny("Mixtral", hidden_size=64, intermediate_size=64), tmp_path / "m")
    )
    block = skeleton.blocks[0]
    ladders = ladders_of(block, open_packed(skeleton, []))
    assert len(ladders) == block.num_experts and len(set(ladders)) == 1
    for step in ladders[0]:
        format = parse_format(step.format)
        assert (step.nbytes, step.error) == (
            format.nbytes(block.layout.specs),
            format.expected_error,
        )
    assert {step.format for step in ladders[0]} <= set(AUTO_FORMATS)
    assert ladders[0][-1].format == "native" and ladders[0][-1].error == 0


def test_auto_uses_measured_errors(tmp_path: Path) -> None:
    """Return the choices of each expert when every format is packed."""
    skeleton = build_skeleton(
        saved(tiny("Mixtral", hidden_size=64, intermediate_size=64), tmp_path / "m")
    )
    block = skeleton.blocks[0]
    formats = [parse_format(name) for name in AUTO_FORMATS if name != "native"]
    pack(skeleton, formats[1:])
    expected = ladders_of(block, open_packed(skeleton, formats))
    assert len(set(expected)) == 1, "all experts alike"
    pack(skeleton, formats)
    packed = open_packed(skeleton, formats)
    for expert, steps in enumerate(ladders_of(block, packed)):
        measured = {one.name: packed.relative_errors(block.name, one)[expert] for one in formats}
        assert {one.format: one.error for one in steps[:-1]}.items() <= measured.items()
        assert (steps[0].format, steps[-1].format, steps[-1].error) == ("int2", "native", 0)


def test_block_choices_equal_expert_choices() -> None:
    small = LADDER[:1]
    assert by_expert({"a": [LADDER, small], "b": [small]}) == {
        ("a", 0): LADDER,
        ("a", 1): small,
        ("b", 0): small,
    }


@given(st.integers(0, 700))
def test_initial_choices_are_uniform_and_fit(room: int) -> None:
    ladders = by_expert({"a": [LADDER] * 3, "b": [LADDER]})
    chosen = initial_choices(ladders, room)
    assert chosen.keys() == ladders.keys()
    extra = sum(choice.nbytes - LADDER[0].nbytes for choice in chosen.values())
    assert extra <= room
    steps = sorted(LADDER.index(choice) for choice in chosen.values())
    assert steps[-1] - steps[0] <= 1, "nobody is two steps ahead"
    if room >= 4 * (160 - 20):
        assert {choice.format for choice in chosen.values()} == {"native"}
