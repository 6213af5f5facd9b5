from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import ConfigError
from moefit.serve.config import Policy


@pytest.mark.parametrize(
    "setting",
    [{"mode": "fast"}, {"prefill": ""}, {"residency": None}, {"bound": -0.1},
     {"bound": 1.1}, {"bound": float("nan")}, {"bound": "0.2"}, {"bound": None},
     {"protected": -1}, {"protected": 1.5}, {"protected": "1"}],
    ids=str,
)  # fmt: skip
def test_invalid_policy_names_setting(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Policy(**setting).check()


@pytest.mark.parametrize("setting", [{}, {"bound": 0}, {"bound": 1}, {"protected": 0}])
def test_policies_at_their_limits(setting: dict[str, Any]) -> None:
    Policy(**setting).check()


@given(st.integers(1, 60), st.floats(0, 0.5), st.floats(0, 1))
def test_bound_rises_with_depth(blocks, bound, ramp) -> None:
    policy = Policy(bound=bound, ramp=ramp)
    bounds = [policy.bound_at((number + 0.5) / blocks) for number in range(blocks)]
    assert bounds == sorted(bounds) and bounds[-1] <= 2 * bound + 1e-9
    assert sum(bounds) / blocks == pytest.approx(bound)


def test_bound_is_capped_at_one() -> None:
    assert Policy(bound=0.9).bound_at(0.9) == 1


def test_prefill_follows_the_mode_unless_given() -> None:
    assert Policy().changed("virtual").prefill == "virtual"
    assert Policy(mode="virtual", prefill="virtual").changed("bounded").prefill == "exact"
    assert Policy().changed("virtual", prefill="exact").prefill == "exact"


def test_other_settings_stay_as_they_are() -> None:
    before = Policy(bound=0.1, protected=3)
    assert before.changed("bounded", protected=0) == Policy(mode="bounded", bound=0.1, protected=0)
    assert before == Policy(bound=0.1, protected=3)


def test_unknown_setting_lists_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*bounds.*use mode, prefill"):
        Policy().changed("bounded", bounds=0.2)
    with pytest.raises(ConfigError, match="bound=2"):
        Policy().changed("bounded", bound=2)
