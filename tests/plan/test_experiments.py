"""Which configurations a profile measures."""

import pytest

from moefit.plan.experiments import BlockShape, groups, quality_configuration, quality_names

ERRORS = dict.fromkeys(("native", "int8", "int6", "int5", "int4", "int3", "int2"), [0.0] * 4)
SHAPE = BlockShape(num_experts=4, weights=64, slot_bytes=dict.fromkeys(ERRORS, 1), errors=ERRORS)


def shapes(count: int) -> dict[str, BlockShape]:
    return {f"block {number}": SHAPE for number in range(count)}


@pytest.mark.parametrize(("blocks", "expected"), [(1, 1), (3, 3), (8, 8), (9, 8), (48, 8)])
def test_each_block_is_in_one_group_and_groups_are_few(blocks: int, expected: int) -> None:
    found = groups(shapes(blocks))
    assert len(found) == expected
    assert [name for group in found for name in group] == list(shapes(blocks))
    sizes = [len(group) for group in found]
    assert max(sizes) - min(sizes) <= 1


def test_more_blocks_do_not_mean_more_configurations() -> None:
    assert len(quality_names(shapes(48))) == len(quality_names(shapes(8)))


def test_a_probe_encodes_its_group_and_no_other_block() -> None:
    some = shapes(16)
    placement = quality_configuration("block/int2/3", some, {}).placement
    encoded = [name for name, one in placement.items() if one.formats == ("int2",)]
    assert encoded == groups(some)[3] == ["block 6", "block 7"]
    assert {placement[name].formats for name in some if name not in encoded} == {("native",)}
