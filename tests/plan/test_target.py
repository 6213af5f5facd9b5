import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import ConfigError
from moefit.plan.configuration import Configuration
from moefit.plan.plan_file import DEFAULT_LOSS, PlanChooser, Target
from moefit.plan.search import Point, pareto

CHOOSER = PlanChooser(margin=0.01, tolerance=0.05)
LOSSES, SECONDS = st.floats(0, 0.5), st.floats(0.01, 1)
FRONTS = st.lists(st.tuples(LOSSES, SECONDS), min_size=1, max_size=9).map(
    lambda pairs: pareto([point(*pair) for pair in pairs])
)


def point(loss: float, seconds: float) -> Point:
    return Point(configuration=Configuration(placement={}), loss=loss, seconds=seconds, nbytes=0)


@given(FRONTS, st.floats(0, 0.6), st.floats(0.5, 120))
def test_target_is_met_or_raises(front: list[Point], loss: float, speed: float) -> None:
    for target in (
        Target(max_loss=loss), Target(min_speed=speed), Target(max_loss=loss, min_speed=speed)
    ):  # fmt: skip
        try:
            chosen = CHOOSER.choose(front, target, 1)
        except ConfigError:
            continue
        assert target.max_loss is None or chosen.loss <= loss
        assert target.min_speed is None or chosen.speed >= speed


def test_best_quality_among_equally_fast() -> None:
    front = [point(0.018, 0.100), point(0.005, 0.104), point(0.001, 0.2)]
    assert CHOOSER.choose(front, Target(), 1) is front[1]
    assert CHOOSER.choose(front, Target(max_loss=0.002), 1) is front[2]
    assert CHOOSER.choose(front, Target(min_speed=9.9), 1) is front[0]


def test_best_without_target() -> None:
    front = [point(0.4, 0.1), point(DEFAULT_LOSS + 0.01, 0.2)]
    assert CHOOSER.choose(front, Target(), 1) is front[1]


def test_margin_applies_only_with_loss() -> None:
    front = [point(0.025, 0.1), point(0.0, 1.0)]
    assert CHOOSER.choose(front, Target(max_loss=0.03), 1) is front[1]
    assert CHOOSER.choose(front, Target(max_loss=0.036), 1) is front[0]
    assert CHOOSER.choose(front, Target(max_loss=0.0), 1) is front[1]


def test_unreachable_target_names_alternative() -> None:
    with pytest.raises(ConfigError, match=r"a loss of 4\.00% at 1\.00 .* makes 9\.99 tokens/s"):
        CHOOSER.choose([point(0.2, 0.1001), point(0.03, 0.999)], Target(max_loss=0.01), 1)
