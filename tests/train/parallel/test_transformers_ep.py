"""Stock models by transformers' expert parallelism, whose tokens travel moefit's ways."""

import pytest
from processes import results
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moefit.errors import ConfigError
from moefit.train.parallel.transformers_ep import (
    TokensTravel,
    _check_members,
    register_expert_parallelism,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes find, each a machine."""
    folder = tmp_path_factory.mktemp("stock")
    return results(2, "stock_cases", folder, "equality:2", "limited", "refusals")


def assert_equal_to_one_process(found):
    assert len(found) == 6
    for name, (loss, gradient) in found.items():
        assert loss < 2e-6, name  # 0 numbers differ between the ways
        assert gradient < 1e-6, name


def test_stock_models_of_two_processes_equal_one(pair):
    assert_equal_to_one_process(pair["equality:2"])


@pytest.mark.slow
def test_stock_models_of_four_processes_equal_one(tmp_path):
    found = results(4, "stock_cases", tmp_path, "equality:4", "equality:2")
    for case in ("equality:4", "equality:2"):
        assert_equal_to_one_process(found[case])


def test_a_capacity_holds_in_training_only(pair):
    """64 tokens for one of 8 experts, of which half an even share is sent."""
    assert pair["limited"] == [1 - 4 / 64, 0]


def test_what_does_not_work_is_refused(pair):
    unequal, shared, none = pair["refusals"]
    assert "machines have different numbers of processes (1, 2)" in unequal
    assert "tp_size=2; give tp_size=1" in shared
    assert "capacity_factor=0 is not a number of even shares" in none


def test_groups_that_lie_unequally_on_machines_are_refused():
    with pytest.raises(ConfigError, match=r"machines 0, 0, 0, 1, not .* divides the 3 processes"):
        _check_members(range(4), 3)
    _check_members(range(3, 6), 3)
    _check_members(range(6), 3)


def test_names_are_registered_with_transformers():
    names = register_expert_parallelism()
    assert names == ("moefit_flat", "moefit_hierarchical")
    assert set(names) <= set(EPImplementationInterface())
    assert issubclass(TokensTravel, EPImplementation)


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity_factor", float("inf")), ("capacity_factor", -1.0), ("processes_per_machine", 0)],
)
def test_numbers_that_mean_nothing_are_refused(name, value):
    """Not silently replaced, nor an error of the first step."""
    with pytest.raises(ConfigError, match=f"{name}={value:g} .*; give"):
        register_expert_parallelism(**{name: value})
