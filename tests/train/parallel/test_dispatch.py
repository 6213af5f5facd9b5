import pytest
import torch

from moefit.errors import ConfigError
from moefit.train.config import make_config
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.dispatch import Dispatch, capacity_line, check_spreadable
from moefit.train.parallel.exchange import sent_rows
from moefit.train.parallel.expert_tensor import check_divisible
from moefit.train.parallel.parallelism import own_machine, parallelism
from moefit.train.parallel.processes import OneProcess, joined_processes


def test_tokens_beyond_the_capacity_are_dropped_in_order():
    ids_R = torch.tensor([2, 0, 2, 2, 4, 1, 2, 0])  # 4 is padding
    everything = sent_rows(ids_R, 4, None)
    assert everything.tolist() == [1, 7, 5, 0, 2, 3, 6]
    assert sent_rows(ids_R, 4, 1.0).tolist() == [1, 7, 5, 0, 2]


def test_experts_of_this_machine():
    dispatch = Dispatch(
        mesh=None,
        shares=2,
        rank=0,
        own_machine=(True, False),
        capacity_factor=None,
        clock=Clock(torch.device("cpu")),
        num_experts=4,
    )
    assert dispatch.own_E.tolist() == [True, True, False, False]


def test_models_that_cannot_be_spread_raise():
    with pytest.raises(ConfigError, match=r"training_rule=dense; give model\.training_rule"):
        check_spreadable(8, 2, "dense")
    with pytest.raises(ConfigError, match=r"nearest that works is model\.num_experts=9"):
        check_spreadable(8, 3, "top_k:2")
    with pytest.raises(ConfigError, match=r"dense \(model\.num_experts=1\); give parallel"):
        check_divisible(1, 2)
    with pytest.raises(ConfigError, match=r"8 do not divide .*works is parallel\.expert_tensor=4"):
        check_divisible(8, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert": 5}, "expert=5 does not divide the 12 processes; the nearest that works is 4"),
        ({"expert": 4}, "not equally many of each machine, which has 6; give a divisor of 6"),
        ({"replicate": 12}, "leaves one process to a copy .*; give parallel.expert=12"),
        (
            {"expert": 6, "all_to_all": "hierarchical"},
            "the 6 processes .*flat, or parallel.expert=12",
        ),
    ],
)
def test_groups_that_cannot_share_experts_raise(settings, message):
    """12 processes on two machines."""
    config = make_config({"parallel": {"experts": "all_to_all", **settings}, "batch_size": 12})
    with pytest.raises(ConfigError, match=message):
        parallelism(config, OneProcess(size=12, nodes=2), torch.device("cpu"))


def test_members_of_a_group_on_this_machine():
    """Of 8 processes on 4 machines; with replicate, a copy of the model has one group."""
    found = []
    for settings in ({"expert": 4}, {"replicate": 4}, {}):
        config = make_config({"parallel": {"experts": "all_to_all", **settings}, "batch_size": 8})
        found.append(own_machine(config, OneProcess(rank=6, size=8, nodes=4)))
    no, yes = (False, False), (True, True)
    assert found == [no + yes, yes, no + no + no + yes]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"capacity_factor": 1.5}}, "capacity_factor=1.5 has no effect"),
        ({"parallel": {"all_to_all": "hierarchical"}}, "all_to_all=hierarchical has no effect"),
        ({"parallel": {"capacity_delta": 0.03}}, "capacity_delta=0.03 has no effect"),
        ({"parallel": {"expert": 2}}, "expert=2 has no effect"),
        ({"parallel": {"node_limit": "own"}}, "node_limit=own has no effect"),
        ({"parallel": {"node_limit": 0}}, "parallel.node_limit"),
        ({"parallel": {"node_bias": 2}}, "node_bias=2 has no effect"),
        (
            {"parallel": {"expert_tensor": 2, "experts": "all_to_all"}},
            "both divide the experts; give expert_tensor=1",
        ),
        ({"loss": {"locality": 1}}, "loss.locality=1 has no effect"),
        ({"loss": {"locality_ramp": [1, 0]}}, "ends before it starts"),
        ({"compile": True, "parallel": {"experts": "all_to_all"}}, "give compile=false"),
    ],
)
def test_settings_without_effect_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(settings)


def test_capacity_is_said_beside_the_lower_bound():
    class Config:
        num_experts, hidden_size = 16, 5120

    line = capacity_line(Config(), 100, 1.25, None)
    assert "8 tokens; an even share of 100 tokens is 6.2, LocMoE's lower bound 0.20" in line
    assert "bound 1.96 (with delta 0.03)" in capacity_line(Config(), 100, None, 0.03)


def test_half_of_torchruns_variables_raise(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match=r"RANK, LOCAL_RANK.* is not; start with torchrun"),
        joined_processes(),
    ):
        raise AssertionError("not reached")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined_processes() as processes:
        assert processes.is_main


def test_a_paused_clock_measures_nothing():
    clock = Clock(torch.device("cpu"))
    with clock.paused(), clock.running():
        sum(range(1000))
    assert clock.seconds() == 0.0
    with clock.running():
        sum(range(1000))
    assert clock.seconds() > 0.0
