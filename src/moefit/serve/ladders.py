"""The formats that each expert of a model may have under `--precision auto`, smallest first.

Owns which formats there are to choose from, what each costs and loses an expert (`Choice`), and
what experts begin with. The choice is made in `precision.py`; knows nothing of slots in use.
"""

from collections.abc import Mapping, Sequence

from moefit.formats.error import expected_error
from moefit.formats.format import FORMATS, Format, NativeFormat
from moefit.moe.families import MoeBlock
from moefit.serve.packed import PackedStore
from moefit.serve.precision import Choice, Ladder, allocate, ladder

Key = tuple[str, int]
"""Block name and expert."""
AUTO = ("int2", "int3", "int4", "int5", "int6", "int8", "native")


def beginning(ladders: Mapping[Key, Ladder], room: int) -> dict[Key, Choice]:
    """What experts have before anything is known of their use; `room`: bytes beyond the smallest
    formats'."""
    smallest = sum(ladder[0].nbytes for ladder in ladders.values())
    return allocate(ladders, dict.fromkeys(ladders, 1.0), smallest + room)


def by_expert(ladders: Mapping[str, Sequence[Ladder]]) -> dict[Key, Ladder]:
    """Ladders of blocks as those of experts."""
    return {
        (name, expert): steps
        for name, of_block in ladders.items()
        for expert, steps in enumerate(of_block)
    }


def ladders_of(block: MoeBlock, packed: PackedStore) -> tuple[Ladder, ...]:
    """The formats that each expert of a block may have, with what each loses.

    That was measured of each expert where all of the formats are packed, with the same calibration
    or with none, and is else what is to be expected of any.
    """
    specs = block.layout.specs
    errors = {name: [expected_error(format)] * block.num_experts for name, format in _formats()}
    encoded = [
        (name, format) for name, format in _formats() if not isinstance(format, NativeFormat)
    ]
    if all(packed.has(block.name, format) for _, format in encoded) and (
        len({packed.calibration(block.name, format) for _, format in encoded}) == 1
    ):
        for name, format in encoded:
            errors[name] = list(packed.relative_errors(block.name, format))
    return tuple(
        ladder(
            [
                Choice(format=name, nbytes=format.nbytes(specs), error=errors[name][expert])
                for name, format in _formats()
            ]
        )
        for expert in range(block.num_experts)
    )


def _formats() -> list[tuple[str, Format]]:
    return [(name, FORMATS[name]) for name in AUTO]
