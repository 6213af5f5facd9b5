from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.memory.budget import (
    BlockNeeds,
    MemoryBudget,
    PlannedSlots,
    format_bytes,
    host_limit,
    parse_bytes,
)

GIB = 1 << 30


@st.composite
def ledgers(draw, *, equal: bool = False) -> MemoryBudget:
    """Random parts, and blocks of different or equal sizes."""
    sizes = st.just(draw(st.integers(1, 50))) if equal else st.integers(1, 50)
    experts = st.just(draw(st.integers(1, 9))) if equal else st.integers(1, 9)
    parts = {
        name: draw(st.integers(0, 1000))
        for name in ("process", "tokenizer", "weights", "kv_cache", "workspace", "staging")
    }
    blocks = []
    for number in range(draw(st.integers(1, 6))):
        num_experts = draw(experts)
        fewest = 1 if equal else draw(st.integers(1, num_experts))
        blocks.append(
            BlockNeeds(
                name=str(number), num_experts=num_experts, slot_bytes=draw(sizes), min_slots=fewest
            )
        )
    return MemoryBudget(total=None, blocks=tuple(blocks), **parts)


def ledger(total: int | None = None, **parts: int) -> MemoryBudget:
    """Two blocks of four experts of 1,000 bytes; a minimum of 3,500."""
    sizes = {"process": 1000, "weights": 300, "kv_cache": 100, "workspace": 60, "staging": 40}
    blocks = tuple(
        BlockNeeds(name=name, num_experts=4, slot_bytes=1000, min_slots=1) for name in ("a", "b")
    )
    return MemoryBudget(total=total, blocks=blocks, **(sizes | parts))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), (7, 7), ("1048576", 1 << 20), ("1KiB", 1024), ("1kb", 1000), ("1k", 1000),
     ("1Ki", 1024), ("512MB", 512_000_000), ("512mib", 512 << 20), ("3g", 3_000_000_000),
     ("3Gi", 3 * GIB), ("0.5GiB", GIB // 2), (".5GiB", GIB // 2), ("4.7GiB", int(4.7 * GIB)),
     ("2TiB", 2048 * GIB), ("12 B", 12), ("  8 MiB ", 8 << 20), ("1.9", 1)],
)  # fmt: skip
def test_sizes_are_parsed(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "0", 0, "0GiB", "0.0001", -1, "-1", "-4GiB", "+1", "1e9", "nan", "inf",
     "4,7GiB", "4.7.1", "1.GiB", "1 2", "5 parrots", "4.7GiBs", "0x10", "٣", "1PiB", "50%",
     True, None, 4.7j, "½GiB", "1\n2", "9" * 400, "9" * 5000, "." + "0" * 5000 + "1"],
)  # fmt: skip
def test_invalid_size_raises(text) -> None:
    with pytest.raises(ConfigError, match=r"is not a size; write bytes or a number with a unit"):
        parse_bytes(text)


@given(st.integers(1, 10**18) | st.integers(2**53, 2**60))
def test_bytes_are_exact(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == size


@given(st.integers(1, 10**14))
def test_size_round_trips_to_three_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=6e-3)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10 << 10, "10.0 KiB"),
     (100 << 10, "100 KiB"), (3 << 20, "3.00 MiB"), (5000 * GIB, "5000 GiB"), (-2048, "-2.00 KiB")],
)  # fmt: skip
def test_sizes_are_formatted(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(ledgers(), st.integers(0, 3000))
def test_slots_never_exceed_the_total(budget: MemoryBudget, more: int) -> None:
    budget = budget.with_total(budget.min_bytes + more)
    counts = budget.slots()
    assert budget.total is not None
    assert budget.total_for_slots(counts) <= budget.total
    for count, block in zip(counts, budget.blocks, strict=True):
        assert block.min_slots <= count <= block.num_experts


@given(ledgers(equal=True), st.integers(0, 3000))
def test_equal_blocks_share_slots_evenly(budget: MemoryBudget, more: int) -> None:
    budget = budget.with_total(budget.min_bytes + more)
    counts = budget.slots()
    assert sorted(counts, reverse=True) == list(counts), "what is left over goes to the first"
    assert counts[0] - counts[-1] <= 1
    if counts != tuple(block.num_experts for block in budget.blocks):
        assert budget.total is not None
        left = budget.total - budget.total_for_slots(counts)
        assert left < budget.blocks[0].slot_bytes


@given(ledgers(equal=True), st.integers(0, 2000), st.integers(0, 500))
def test_more_memory_never_reduces_slots(budget: MemoryBudget, some: int, more: int) -> None:
    small = budget.with_total(budget.min_bytes + some).slots()
    large = budget.with_total(budget.min_bytes + some + more).slots()
    assert all(a <= b for a, b in zip(small, large, strict=True))


@given(ledgers())
def test_minimum_budget_gives_minimum_slots(budget: MemoryBudget) -> None:
    counts = budget.with_total(budget.min_bytes).slots()
    assert counts == tuple(block.min_slots for block in budget.blocks)
    assert budget.total_for_slots(counts) == budget.min_bytes


@given(ledgers(), st.integers(1, 10**9))
def test_errors_below_the_minimum_name_a_total_that_works(budget: MemoryBudget, less: int) -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        budget.with_total(budget.min_bytes - less).slots()
    (named,) = [int(w) for w in str(caught.value).split("at least ")[1].split()[:1]]
    assert named == budget.min_bytes
    budget.with_total(named).slots()


def test_the_error_lists_the_parts_of_the_minimum() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        ledger(total=3000).slots()
    assert str(caught.value) == (
        "a budget of 2.93 KiB is below this model's minimum of 3.42 KiB (1000 B interpreter and "
        "libraries, 0 B tokenizer, 300 B dense weights, 100 B KV cache, 60 B workspace, 40 B "
        "staging, 1.95 KiB for one slot per block); give at least 3500 bytes, such as 4KiB, or a "
        "shorter context"
    )


@given(ledgers(), st.integers(0, 10**6))
def test_all_resident_bytes_is_the_smallest_such_total(budget: MemoryBudget, more: int) -> None:
    all_experts = tuple(block.num_experts for block in budget.blocks)
    assert budget.slots() == all_experts
    assert budget.with_total(budget.all_resident_bytes + more).slots() == all_experts
    assert budget.total_for_slots(all_experts) == budget.all_resident_bytes
    if budget.all_resident_bytes > budget.min_bytes:
        assert budget.with_total(budget.all_resident_bytes - 1).slots() != all_experts


def test_the_parts_add_up_and_go_to_json() -> None:
    budget = ledger(total=5000)
    assert budget.fixed == 1500 and budget.min_bytes == 3500 and budget.all_resident_bytes == 9500
    assert budget.slots() == (2, 1)
    assert budget.as_dict() == {
        "total": 5000, "context": None, "process": 1000, "weights": 300, "kv_cache": 100,
        "workspace": 60, "staging": 40, "tokenizer": 0, "floor": 3500, "everything": 9500,
        "most": 9500, "host": None,
    }  # fmt: skip
    assert budget.with_total(9000).with_total(5000) == budget


@pytest.mark.parametrize("nothing", [None, 0, "0"])
def test_host_memory_defaults_to_buffer_per_reader(nothing) -> None:
    assert host_limit(nothing, largest=1000, readers=6) == 6000


def test_host_memory_holds_at_least_one_expert() -> None:
    assert host_limit("1000", largest=1000, readers=6) == 1000
    with pytest.raises(
        ConfigError, match=r"host memory of 999 B cannot hold an expert.* at least 1000 bytes"
    ):
        host_limit(999, largest=1000, readers=6)
    for text in (-1, "much", "", "0GiB", True):
        with pytest.raises(ConfigError, match="is not a size"):
            host_limit(text, largest=1000, readers=6)


@given(ledgers(), st.data())
def test_plan_that_does_not_fit_is_dropped(budget: MemoryBudget, data: st.DataObject) -> None:
    counts = tuple(data.draw(st.integers(1, block.num_experts)) for block in budget.blocks)
    plan = PlannedSlots(
        counts=counts, nbytes=data.draw(st.integers(0, 500)), spares=data.draw(st.integers(0, 100))
    )
    planned = replace(budget, planned=plan)
    total = planned.min_bytes + data.draw(st.integers(0, 500))
    after = planned.with_total(total)
    if total >= planned.fixed + plan.nbytes:
        assert after == replace(planned, total=total) and after.slots() == counts
        return
    assert after.planned is None and after.min_bytes == planned.min_bytes <= total
    assert after.total_for_slots(after.slots()) <= total
    assert after.fixed == planned.fixed + plan.spares
