"""Which experts are read again in a better format: those that carry much of a token's weight.

Owns the decision: from a step's choice, and from what is packed. Where all experts are in memory in
few bits (`--precision auto`), errors are squares, so an expert with half of a token's router weight
adds many times the error of one with a tenth; of such a one a better copy is worth reading. Pure:
`better_copies.py` carries it out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from moefit.errors import ConfigError
from moefit.formats.error import expected_error
from moefit.formats.format import FORMATS, Format, NativeFormat
from moefit.moe.families import MoeBlock
from moefit.serve.packed import PackedStore

SCRATCH_SLOTS = (
    2  # one is computed from while the other is filled; all experts' formats pay for more
)


def heavy(choices: Iterable[Mapping[int, float]], threshold: float) -> set[int]:
    """Experts that have at least the share `threshold` of some token's router weight.

    choices: of each token, its experts' weights, which need not add up to one.

    >>> sorted(heavy([{0: 3.0, 5: 1.0}, {2: 0.2, 5: 0.2}], 0.5))
    [0, 2, 5]
    """
    found: set[int] = set()
    for weights in choices:
        least = threshold * sum(weights.values())
        found |= {expert for expert, weight in weights.items() if weight >= least > 0}
    return found


def worth_reading(
    experts: Iterable[int], now: Callable[[int], Format], better: Format
) -> frozenset[int]:
    """Those of the experts whose format now is worse than the better one."""
    error = expected_error(better)
    return frozenset(expert for expert in experts if expected_error(now(expert)) > error)


def better_formats(blocks: Sequence[MoeBlock], packed: PackedStore) -> dict[str, Format]:
    """By block, the best format that it is packed in.

    Raises ConfigError if there is a block with none that is better than the smallest there is.
    """
    found = {block.name: _best_packed(block, packed) for block in blocks}
    without = [name for name, format in found.items() if format is None]
    if without:
        raise ConfigError(
            f"refetch reads experts again in a better format than their slots' from the packed "
            f"store, and {len(without)} of {len(blocks)} blocks ({without[0]}) are packed in none "
            "that could be better; run moefit pack MODEL --formats int8,int6,int5,int4,int3,int2, "
            "or leave refetch out"
        )
    return {name: format for name, format in found.items() if format is not None}


def _best_packed(block: MoeBlock, packed: PackedStore) -> Format | None:
    """None if it is the worst of all, for then nothing in a slot is worse."""
    encoded = [format for format in FORMATS.values() if not isinstance(format, NativeFormat)]
    worst = max(map(expected_error, encoded))
    some = [one for one in encoded if packed.has(block.name, one) and expected_error(one) < worst]
    return min(some, key=expected_error, default=None)


def largest_copy(blocks: Sequence[MoeBlock], formats: Mapping[str, Format]) -> int:
    """Bytes that a scratch slot must have, for it may hold any block's expert."""
    return max(formats[block.name].nbytes(block.layout.specs) for block in blocks)
