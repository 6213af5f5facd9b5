"""Models and settings of vLLM that the plugin refuses; these tests need no vLLM."""

from types import SimpleNamespace

import pytest
from moefit_vllm.config import DsMoeConfig
from moefit_vllm.refused import refuse_untested


def refuse(model=None, **parallel):
    """Check a small model with settings of vLLM."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    settings = {**dict.fromkeys(sizes, 1), "enable_expert_parallel": False, **parallel}
    vllm = SimpleNamespace(parallel_config=SimpleNamespace(**settings), quant_config=None)
    refuse_untested(DsMoeConfig(num_key_value_heads=2, intermediate_size=32, **(model or {})), vllm)


def test_a_plain_model_is_served():
    """On one device and on two."""
    refuse()
    refuse(tensor_parallel_size=2)


@pytest.mark.parametrize(
    "changed",
    [
        {"tensor_parallel_size": 3},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_expert_parallel": True},
    ],
)
def test_several_devices_are_refused_by_name(changed):
    """Whichever way of dividing the model is given."""
    with pytest.raises(ValueError, match=next(iter(changed))):
        refuse(**changed)


@pytest.mark.parametrize(
    "model",
    [
        {"pregated": True},
        {"pregated": "previous_token"},
        {"router_type": "grap"},
        {"score_correction_bias": True},
    ],
)
def test_other_routers_are_refused_by_name(model):
    """The plugin would compute these models with the wrong experts."""
    with pytest.raises(ValueError, match=next(iter(model))):
        refuse(model)
