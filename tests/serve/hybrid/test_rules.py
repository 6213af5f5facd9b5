"""Rules that divide a layer's experts, against times computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import ConfigError
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.rules import (
    RULES,
    balanced,
    fiddler,
    layer_time,
    layer_times,
    monde,
    search,
)
from moefit.simulate.costs import ExpertShape, expert_costs, find_hardware, find_shape

# Cycles per expert that DynaNDE's simulator publishes for FLAME-MoE-290M: a load, and two products.
LOAD, PRODUCTS = 353_600, 20_089 + 20_088
CYCLES = Costs(load=LOAD, gpu=(PRODUCTS, 0), far=(PRODUCTS, 0))


@pytest.mark.parametrize(
    ("active", "fetched", "cycles"),
    [
        (8, 0, 8 * PRODUCTS),  # a load takes longer than all eight
        (12, 1, 11 * PRODUCTS),  # 441,947 beside 393,777 of one load and its products
        (20, 2, 2 * LOAD + PRODUCTS),  # 747,377 beside 723,186; one load: 763,363
    ],
)
def test_search_agrees_with_times_by_hand(active, fetched, cycles) -> None:
    tokens = [1] * active
    assert search(CYCLES, tokens, []) == fetched
    assert max(layer_time(CYCLES, tokens, [], fetched)) == cycles


def test_copies_overlap_with_computation() -> None:
    costs = Costs(load=10, gpu=(4, 1), far=(3, 2), activations=0.5)
    # Residents 4 + 6; the first copy arrives at 10, its expert ends at 15; the second at 20 and 24.
    gpu, far = layer_time(costs, [5, 1, 2, 2], [1, 6], 2)
    assert (gpu, far) == (24, 4 + 4 + 0.5 * 4)
    assert layer_time(costs, [5, 1], [], 0) == (0, 10 + 3 + 0.5 * 6)
    assert layer_time(costs, [], [3], 0) == (4, 0)


def test_copies_slow_reading_of_a_shared_memory() -> None:
    apart = Costs(load=10, gpu=(0, 0), far=(6, 0), far_read=6)
    shared = Costs(load=10, gpu=(0, 0), far=(6, 0), far_read=6, shared=0.5)
    assert layer_time(apart, [1, 1], [], 1)[1] == 6
    assert layer_time(shared, [1, 1], [], 1)[1] == 10 + 1  # 5 of 6 while the copy lasts
    assert layer_time(shared, [1, 1], [], 0)[1] == 12  # no copy
    assert layer_time(shared, [1, 1, 1, 1], [], 3)[1] == 12  # reading ends before the copies
    # Three quarters of the far side's time are not reading, and are not slowed down.
    fixed = Costs(load=10, gpu=(0, 0), far=(24, 0), far_read=6, shared=0.5)
    assert layer_time(fixed, [1, 1], [], 1)[1] == 24 - 6 + 11


def test_monde_moves_6_percent_at_32_and_512_gigabytes() -> None:
    costs = expert_costs(find_hardware("monde"), find_shape("switch-large-128"))
    assert monde(costs, [1] * 100, []) == 6
    assert monde(costs, [1] * 8, []) == 0  # rounded


def test_balanced_halves_are_equal() -> None:
    even = Costs(load=2, gpu=(0, 0), far=(1, 0), far_read=1)
    assert balanced(even, [1] * 9, []) == 3
    half = Costs(load=2, gpu=(0, 0), far=(1, 0), far_read=1, shared=0.5)
    assert balanced(half, [1] * 8, []) == 4
    assert balanced(even, [], []) == 0


def test_fiddler_decides_for_each_expert() -> None:
    """Its code has 7 per token on the CPU and 70 for a copy: the cross-over is at ten tokens."""
    costs = Costs(load=70, gpu=(0, 0), far=(0, 7))
    assert fiddler(costs, [30, 11, 10, 9, 1], []) == 2


@given(
    absent=st.lists(st.integers(1, 60), max_size=12),
    resident=st.lists(st.integers(1, 60), max_size=4),
    numbers=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    shared=st.sampled_from([0.0, 0.4]),
)
def test_search_is_never_slower_and_all_are_in_range(absent, resident, numbers, shared) -> None:
    load, gpu, gpu_token, read, more, far_token = numbers
    costs = Costs(
        load=load,
        gpu=(gpu, gpu_token),
        far=(read + more, far_token),
        far_read=read,
        activations=0.01,
        shared=shared,
        start=more / 2,
    )
    absent = sorted(absent, reverse=True)
    best = max(layer_time(costs, absent, resident, search(costs, absent, resident)))
    for number, times in enumerate(layer_times(costs, absent, resident)):
        assert times == pytest.approx(layer_time(costs, absent, resident, number))
    for rule in RULES.values():
        number = rule(costs, absent, resident)
        assert 0 <= number <= len(absent)
        assert best <= max(layer_time(costs, absent, resident, number)) + 1e-9


def test_far_side_has_fixed_time_per_layer_only_if_it_computes() -> None:
    costs = Costs(load=10, gpu=(1, 0), far=(3, 0), start=2)
    assert layer_time(costs, [1, 1], [], 0) == (0, 8)
    assert layer_time(costs, [1, 1], [], 2) == (21, 0)
    assert search(Costs(load=3, gpu=(0, 0), far=(1, 0), start=5), [1], []) == 1


@pytest.mark.parametrize(
    "changed", [{"load": float("inf")}, {"far": (float("nan"), 0)}, {"start": -1}, {"shared": 1}]
)
def test_impossible_costs_are_refused(changed) -> None:
    """A link without bandwidth takes for ever."""
    with pytest.raises(ConfigError, match=r"but it must be below 1|bandwidths above zero"):
        Costs(**({"load": 1, "gpu": (0, 0), "far": (1, 0)} | changed)).check()


def test_costs_of_a_shape() -> None:
    """An expert of Mixtral has 352 MB in 16 bits, its token 16 KB there and back (MoNDE)."""
    mixtral = find_shape("mixtral-8x7b")
    assert round(mixtral.expert_bytes / 1e6) == 352 and mixtral.token_bytes == 16384
    device = find_hardware("monde")
    costs = expert_costs(device, mixtral)
    assert costs.load == pytest.approx(mixtral.expert_bytes / 32e9)
    assert costs.on_far_side(1) == pytest.approx(mixtral.expert_bytes / 512e9)
    assert costs.on_gpu(10**6) == pytest.approx(2e6 * 3 * 4096 * 14336 / 312e12)
    assert costs.shared == 0
    narrow = ExpertShape(**(mixtral.model_dump() | {"bits": 4}))
    assert narrow.expert_bytes == mixtral.expert_bytes / 4
