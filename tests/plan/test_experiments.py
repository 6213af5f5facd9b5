"""Configurations that a profile measures."""

import pytest

from moefit.plan.experiments import BlockShape, groups, quality_configuration, quality_names

ERRORS = dict.fromkeys(("native", "int8", "int6", "int5", "int4", "int3", "int2"), [0.0] * 4)
SHAPE = BlockShape(num_experts=4, weights=64, slot_bytes=dict.fromkeys(ERRORS, 1), errors=ERRORS)


def shapes(count: int) -> dict[str, BlockShape]:
    return {f"block {number}": SHAPE for number in range(count)}


@pytest.mark.parametrize(("blocks", "expected"), [(1, 1), (3, 3), (8, 8), (9, 8), (48, 8)])
def test_blocks_form_few_disjoint_groups(blocks: int, expected: int) -> None:
    found = groups(shapes(blocks))
    assert len(found) == expected
    assert [name for group in found for name in group] == list(shapes(blocks))
    sizes = [len(group) for group in found]
    assert max(sizes) - min(sizes) <= 1


def test_number_of_configurations_does_not_depend_on_blocks() -> None:
    assert len(quality_names(shapes(48))) == len(quality_names(shapes(8)))


def test_probe_encodes_one_group() -> None:
    some = shapes(16)
    placement = quality_configuration("block/int2/3", some, {}).placement
    encoded = [name for name, one in placement.items() if one.formats == ("int2",)]
    assert encoded == groups(some)[3] == ["block 6", "block 7"]
    assert {placement[name].formats for name in some if name not in encoded} == {("native",)}
