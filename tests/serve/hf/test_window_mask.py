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


@pytest.mark.parametrize(("family", "changed"), [("gpt_oss", True), ("deepseek_v4", False)])
@compiled
def test_sinks_are_by_kernels_unless_a_family_changes_masks(family: str, changed: bool) -> None:
    """DeepSeek-V4 makes masks longer, by its compressed keys, which a window does not describe."""
    model = tiny_family(family)
    undo = use_kernels(model)
    assert (model.config._attn_implementation == INT8_NAME) is changed
    undo()
    assert model.config._attn_implementation == "eager"
