from functools import cache
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from planned import EXPERTS, SENSITIVITY, profile, shapes

from moefit.plan.configuration import PolicyChoice
from moefit.plan.experiments import policy_choices
from moefit.plan.fitting import features_of
from moefit.plan.latency import fit_latency
from moefit.plan.quality import fit_quality
from moefit.plan.search import (
    Models,
    Point,
    PolicyOptions,
    allocate_options,
    allocator_points,
    mixed_placements,
    pareto,
    placement_bytes,
)

WHOLE = sum(one.slot_bytes["native"] * one.num_experts for one in shapes().values())


@cache
def models() -> Models:
    done = profile(noise=0.05)
    known = features_of(done)
    return Models(fit_quality(done, known), fit_latency(done, known), policy_choices())


@cache
def small() -> PolicyOptions:
    """Exact mode with few options, so that all can be enumerated."""
    field = models().by_policy[0]
    return PolicyOptions(
        policy=field.policy,
        options={name: list(some)[::7] for name, some in field.options.items()},
    )


@settings(deadline=None, max_examples=25)
@given(st.floats(0.02, 1.2), st.sampled_from([0.0, 0.3, 10.0]))
def test_allocator_is_near_optimum(share: float, rate: float) -> None:
    room = int(share * WHOLE)

    def cost(some) -> float:
        return sum(one.nats + rate * one.seconds for one in some)

    all_ways = [
        some for some in product(*small().options.values()) if sum(o.nbytes for o in some) <= room
    ]
    found = allocate_options(small(), rate, room)
    if found is None:
        assert not all_ways
        return
    assert sum(one.nbytes for one in found.values()) <= room
    best = min(map(cost, all_ways))
    steps = [
        max(o.nats + rate * o.seconds for o in some) - min(o.nats + rate * o.seconds for o in some)
        for some in small().options.values()
    ]
    assert best <= cost(found.values()) + 1e-12 <= best + max(steps) + 1e-9


@settings(deadline=None, max_examples=10)
@given(st.floats(0.02, 1.1))
def test_proposals_fit_budget(share: float) -> None:
    room = int(share * WHOLE)
    for point in allocator_points(models(), {"native": room, "int8": room // 2}):
        limit = room if point.configuration.dense_precision == "native" else room // 2
        placed = point.configuration.placement
        assert point.nbytes == sum(placement_bytes(placed[n], s) for n, s in shapes().items())
        assert point.nbytes <= limit


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=12))
def test_front_has_no_dominated_point(pairs: list[tuple[int, int]]) -> None:
    configuration = models().by_policy[0].configuration({}, "native")
    points = [
        Point(configuration=configuration, loss=loss, seconds=seconds, nbytes=0)
        for loss, seconds in pairs
    ]
    front = pareto(points)
    for one in points:
        assert any(f.loss <= one.loss and f.seconds <= one.seconds for f in front)
    for a, b in product(front, front):
        assert a is b or a.loss < b.loss or a.seconds < b.seconds


def test_mixtures_give_high_energy_experts_more_bits() -> None:
    known = models().quality.additive.features
    for name in SENSITIVITY:
        output_energy = known.blocks[name].output_energy_E
        loudest, quietest = (
            output_energy.index(max(output_energy)),
            output_energy.index(min(output_energy)),
        )
        for one in mixed_placements(name, known, 1.0):
            assert one.slots == len(one.formats) == EXPERTS
            sizes = shapes()[name].slot_bytes
            assert sizes[one.formats[loudest]] >= sizes[one.formats[quietest]]


def test_unknown_routers_allow_exact_mode_only() -> None:
    assert policy_choices(known_rules=False) == [PolicyChoice(mode="exact")]
    assert {one.mode for one in policy_choices()} == {"exact", "bounded", "virtual"}
