import pytest
import torch
from torch import Tensor

from moefit.dsmoe.losses import (
    RouterLossWeights,
    language_model_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_loss,
    z_loss,
)


def layers(count: int, num_experts: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, num_experts, generator=generator) for _ in range(count)]


def test_router_losses_are_weighted_sums_over_layers() -> None:
    mlp, attention = layers(3, 5, seed=0), layers(3, 2, seed=1)
    real_T = torch.tensor([False] * 3 + [True] * 9)
    weights = RouterLossWeights(mlp_mi=0.5, attention_mi=2.0, load_balancing=0.25, z=3.0, k=2)
    expected = 0.0
    for x in mlp:
        x_TE = x.flatten(0, 1)[3:]
        expected += 0.5 * mutual_information_loss(x_TE).item()
        expected += 0.25 * load_balancing_loss(x_TE, 2).item() + 3.0 * z_loss(x_TE).item()
    for x in attention:
        expected += 2.0 * mutual_information_loss(x.flatten(0, 1)[3:]).item()
    assert router_loss(mlp, attention, weights, real_T).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "loss"),
    [
        (RouterLossWeights(mlp_mi=0.1), mutual_information_loss),
        (RouterLossWeights(load_balancing=0.1, k=3), lambda x: load_balancing_loss(x, 3)),
        (RouterLossWeights(z=0.1), z_loss),
    ],
)
def test_zero_weight_disables_loss(weights: RouterLossWeights, loss) -> None:
    (mlp,), attention = layers(1, 5, seed=0), layers(1, 2, seed=1)
    expected = 0.1 * loss(mlp.flatten(0, 1)).item()
    assert router_loss([mlp], attention, weights).item() == pytest.approx(expected)


def test_flat_and_shaped_logits_agree() -> None:
    mlp, weights = layers(2, 5, seed=0), RouterLossWeights(mlp_mi=1.0)
    flat = [x.flatten(0, 1) for x in mlp]
    assert router_loss(mlp, (), weights) == router_loss(flat, (), weights)


def test_router_loss_is_zero_without_routers_or_weights() -> None:
    everything = RouterLossWeights(mlp_mi=1.0, attention_mi=1.0, load_balancing=1.0, z=1.0)
    assert router_loss((), (), everything).item() == 0
    mlp, attention = layers(2, 5, seed=0), layers(2, 2, seed=1)
    assert router_loss(mlp, attention, RouterLossWeights()).item() == 0


def test_cross_entropy_is_of_the_next_token() -> None:
    labels_BT = torch.tensor([[0, 1, 2], [2, 2, 0]])
    logits_BTV = torch.zeros(2, 3, 4)
    logits_BTV[torch.arange(2)[:, None], torch.arange(2), labels_BT[:, 1:]] = 100.0
    assert language_model_loss(logits_BTV, labels_BT).item() == pytest.approx(0)
    assert language_model_loss(torch.zeros(2, 3, 4), labels_BT).item() == pytest.approx(1.386294)


def test_labels_of_minus_100_are_ignored() -> None:
    logits_BTV = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.tensor([[3, 1, -100, -100, 2]])
    log_p_BTV = logits_BTV.log_softmax(-1)
    expected = -(log_p_BTV[0, 0, 1] + log_p_BTV[0, 3, 2]) / 2
    torch.testing.assert_close(language_model_loss(logits_BTV, labels_BT), expected)


def test_cross_entropy_is_computed_in_float32() -> None:
    loss = language_model_loss(torch.zeros(1, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 3).long())
    assert loss.dtype == torch.float32
