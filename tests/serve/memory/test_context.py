"""What a KV cache takes that grows, and how far it may."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from moefit.serve.memory.budget import BlockNeeds, MemoryBudget
from moefit.serve.memory.context import ContextCosts

BASE, TOKEN = 100, 10
BUDGET = MemoryBudget(
    total=None, process=500, weights=300, kv_cache=BASE * 8, workspace=200, staging=50,
    blocks=tuple(BlockNeeds(name=n, num_experts=8, slot_bytes=100, min_slots=1) for n in "ab"),
    context=BASE, step_tokens=64,
)  # fmt: skip
COSTS = ContextCosts(
    reserved=BUDGET, token_bytes=TOKEN, steps=lambda tokens: (min(128, tokens), 150 + tokens // 2)
)


def test_parts_grow_and_return() -> None:
    grown = COSTS.at(BUDGET, 300)
    assert (grown.context, grown.kv_cache, grown.workspace, grown.step_tokens) == (
        300, 3000, 300, 128,
    )  # fmt: skip
    assert COSTS.at(grown, 120).workspace == 210
    assert COSTS.at(grown, BASE) == COSTS.at(grown, 3) == BUDGET


@given(
    total=st.integers(BUDGET.min_bytes, 6000),
    tokens=st.integers(BASE, 600),
    spare=st.booleans(),
    grown=st.integers(BASE, 300),
)
def test_needed_is_the_least_total_with_room(
    total: int, tokens: int, spare: bool, grown: int
) -> None:
    budget = COSTS.at(replace(BUDGET, total=total), grown)
    needed = COSTS.needed(budget, tokens, spare_experts=spare)
    fits = COSTS.at(budget, tokens).min_bytes <= total
    if spare and tokens > BASE:  # as it says: half of what they have without
        have = min(total, BUDGET.max_bytes) - BUDGET.fixed
        fits &= total - COSTS.at(budget, tokens).fixed >= have / 2
    assert (needed <= total) == fits


@given(total=st.integers(BUDGET.min_bytes, 6000), spare=st.booleans(), limit=st.integers(1, 900))
def test_most_tokens_for_which_there_is_room(total: int, spare: bool, limit: int) -> None:
    budget = replace(BUDGET, total=total)
    most = COSTS.most(budget, limit, spare_experts=spare)
    assert BASE <= most <= max(BASE, limit)
    assert COSTS.needed(budget, most, spare_experts=spare) <= total
    if most < limit:
        assert COSTS.needed(budget, most + 1, spare_experts=spare) > total
    COSTS.at(budget, most).slots()  # does not raise
