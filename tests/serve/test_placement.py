import pytest
from tiny_served import tiny

from moefit.errors import ConfigError
from moefit.moe.layouts import find_blocks
from moefit.serve.config import BlockPlacement, check_placement

BLOCKS = find_blocks(tiny("Mixtral"))
EVERY = BlockPlacement(slots=8, formats=("int4",))


def test_placement_bytes_equal_slots() -> None:
    block = BLOCKS[0]
    one = EVERY.format_of(0).nbytes(block.layout.specs)
    assert BlockPlacement(slots=3, formats=("int4",)).nbytes(block) == 3 * one
    mixed = BlockPlacement(slots=8, formats=("native",) * 3 + ("int4",) * 5)
    native = mixed.format_of(0).nbytes(block.layout.specs)
    assert mixed.nbytes(block) == 3 * native + 5 * one
    assert mixed.largest(block).name == "native"
    assert [mixed.format_of(expert).name for expert in (2, 3)] == ["native", "int4"]


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (BlockPlacement(slots=0, formats=("int4",)), "1 to 8"),
        (BlockPlacement(slots=9, formats=("int4",)), "1 to 8"),
        (BlockPlacement(slots=4, formats=("int4",) * 4), "one format"),
        (BlockPlacement(slots=8, formats=("int4",) * 7), "one format"),
        (BlockPlacement(slots=8, formats=()), "one format"),
        (BlockPlacement(slots=8, formats=("int7",)), "int7"),
    ],
)
def test_invalid_placement_raises(one: BlockPlacement, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_placement({BLOCKS[0].name: one, BLOCKS[1].name: EVERY}, BLOCKS)


def test_blocks_of_another_model_raise() -> None:
    with pytest.raises(ConfigError, match="plan again"):
        check_placement({"elsewhere": EVERY}, BLOCKS)
