import pytest
import torch

from moefit.dsmoe.losses import router_statistics


def test_statistics_of_uniform_routers():
    state = router_statistics([torch.zeros(10, 4), torch.zeros(10, 4)], epsilon=0.5)
    assert state["h_e"] == pytest.approx(1)
    assert state["h_e_given_x"] == pytest.approx(1)
    assert state["mi"] == pytest.approx(0, abs=1e-6)
    assert (state["active"], state["dead"]) == (1, 0)


def test_statistics_of_balanced_one_hot_routing():
    state = router_statistics([torch.eye(4).repeat(5, 1) * 50], epsilon=0.5)
    assert state["mi"] == pytest.approx(1)
    assert state["h_e_given_x"] == pytest.approx(0, abs=1e-6)
    assert (state["active"], state["dead"]) == (0.25, 0)


def test_statistics_of_collapsed_routing():
    logits = torch.zeros(10, 4)
    logits[:, 0] = 50
    state = router_statistics([logits], epsilon=0.5)
    assert state["mi"] == pytest.approx(0, abs=1e-6)
    assert (state["active"], state["dead"]) == (0.25, 0.75)


def test_statistics_are_averaged_over_layers():
    mixed = router_statistics([torch.zeros(8, 4), torch.eye(4).repeat(2, 1) * 50], epsilon=0.5)
    assert mixed["active"] == pytest.approx((1 + 0.25) / 2)
    assert router_statistics([], epsilon=0.5) == {}
