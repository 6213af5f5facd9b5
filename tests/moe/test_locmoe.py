import pytest
import torch

from moefit.moe.locmoe import (
    OTHER_NODES,
    capacity,
    grouped_average_pooling,
    least_capacity,
    localised,
    locality_loss,
    of_best_machines,
)

OWN_E = torch.tensor([True, True, False, False])


def test_grap_is_a_fixed_gate_of_orthogonal_rows() -> None:
    x_TD = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    gate_ED = torch.eye(4).repeat_interleave(3, dim=1) / 3
    torch.testing.assert_close(grouped_average_pooling(x_TD, 4), (x_TD @ gate_ED.T).relu())


@pytest.mark.parametrize(("width", "delta"), [(8, None), (64, 0.2)])
def test_least_capacity_counts_directions_near_a_row(width: int, delta: float | None) -> None:
    x_TD = torch.randn(200_000, width, generator=torch.Generator().manual_seed(0))
    cosine_T = x_TD[:, 0] / x_TD.norm(dim=1)
    share = float((cosine_T.abs() >= (delta or width**-0.5)).double().mean())
    assert least_capacity(width, 4, delta) == pytest.approx(1 / (4 * share), rel=0.02)


def test_capacity_rounds_up() -> None:
    assert [capacity(tokens, 4, 1.5) for tokens in (0, 1, 8, 9)] == [0, 1, 3, 4]


def test_locality_loss_is_zero_if_tokens_stay_and_pulls_them_home() -> None:
    at_home_TE = localised(OWN_E).log().repeat(3, 1)
    assert locality_loss(at_home_TE, OWN_E).item() == pytest.approx(0, abs=1e-6)
    away = torch.tensor([[0.0, 0.0, 50.0, 50.0]])
    mass = torch.tensor(OTHER_NODES / 2).log().item()
    assert locality_loss(away, OWN_E).item() == pytest.approx(-mass - 0.6931, abs=1e-3)
    even_TE = torch.zeros(2, 4, requires_grad=True)
    locality_loss(even_TE, OWN_E).backward()
    assert even_TE.grad is not None
    assert (even_TE.grad[:, OWN_E] < 0).all()
    assert (even_TE.grad[:, ~OWN_E] > 0).all()


@pytest.mark.parametrize(("machines", "most", "k"), [(4, 2, 4), (4, 1, 4), (3, 2, 3), (6, 5, 1)])
def test_best_machines_are_those_of_a_slow_search(machines: int, most: int, k: int) -> None:
    logits_TE = torch.randn(50, 12, generator=torch.Generator().manual_seed(k))
    found_TE = of_best_machines(logits_TE, machines, most, k)
    each, counted = 12 // machines, -(-k // most)
    for scores_E, found_E in zip(logits_TE.softmax(-1).tolist(), found_TE.tolist(), strict=True):
        groups = [scores_E[n * each : (n + 1) * each] for n in range(machines)]
        sums = [sum(sorted(one, reverse=True)[:counted]) for one in groups]
        best = sorted(range(machines), key=lambda n: -sums[n])[:most]
        assert found_E == [expert // each in best for expert in range(12)]
