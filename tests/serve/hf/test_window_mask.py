import pytest
import torch
from levels import compiled
from tiny_families import tiny_family
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from moefit.serve.hf.attention import (
    INT8_NAME,
    UnpackableError,
    WindowMask,
    int8_attention,
    use_kernels,
    window_mask,
)


def test_transformers_masks_are_parsed() -> None:
    assert window_mask().window is None
    assert window_mask(mask_function=causal_mask_function, local_size=5).window is None
    sliding = sliding_window_causal_mask_function(5)
    assert window_mask(mask_function=sliding, local_size=5).window == 5


@pytest.mark.parametrize(
    "given",
    [
        {"mask_function": sliding_window_causal_mask_function(5)},
        {"mask_function": sliding_window_causal_mask_function(5), "local_size": 6},
        {"mask_function": chunked_causal_mask_function(4, torch.zeros(1)), "local_size": 4},
        {"mask_function": lambda b, h, q, k: q == q},
        {
            "mask_function": and_masks(causal_mask_function, lambda b, h, q, k: k != 3),
            "local_size": None,
        },
        {"attention_mask": torch.ones(1, 4)},
    ],
)
def test_other_masks_raise(given) -> None:
    with pytest.raises(UnpackableError, match="mask"):
        window_mask(**given)


def test_derived_masks_are_not_parsed() -> None:
    mask = WindowMask.of(5, torch.device("cpu"))
    assert mask.window == 5
    for other in (mask[..., :1], mask & mask, mask.clone()):
        assert not hasattr(other, "window")


def test_attention_refuses_masks_that_a_family_changed() -> None:
    mask, query = WindowMask.of(None, torch.device("cpu")), torch.randn(1, 2, 3, 16)
    own = int8_attention(torch.nn.Identity(), query, query, query, mask)[0]
    assert own.shape == (1, 3, 2, 16)
    with pytest.raises(UnpackableError, match="changes its attention mask"):
        int8_attention(torch.nn.Identity(), query, query, query, mask & mask)


def test_attention_over_a_window_has_gradients() -> None:
    mask, query = WindowMask.of(None, torch.device("cpu")), torch.randn(1, 2, 3, 16)
    wanted = int8_attention(torch.nn.Identity(), query, query, query, mask)[0]
    given = query.clone().requires_grad_()
    made = int8_attention(torch.nn.Identity(), given, query, query, mask)[0]
    torch.testing.assert_close(made, wanted)
    made.sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0


@pytest.mark.parametrize(("family", "changed"), [("gpt_oss", True), ("deepseek_v4", False)])
@compiled
def test_sinks_are_by_kernels_unless_a_family_changes_masks(family: str, changed: bool) -> None:
    """DeepSeek-V4 makes masks longer, by its compressed keys, which a window does not describe."""
    model = tiny_family(family)
    undo = use_kernels(model)
    assert (model.config._attn_implementation == INT8_NAME) is changed
    undo()
    assert model.config._attn_implementation == "eager"
