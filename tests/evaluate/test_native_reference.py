"""The native reference model is loaded only if it fits beside the served one."""

import pytest
import torch
from serving import differs_by
from tiny_served import logits, saved, tiny, tokens

from moefit.evaluate.baselines import native_reference
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.memory.held import held_bytes

WIDE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def model():
    return tiny("Mixtral", **WIDE)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize("memory", [None, "8GiB"])
def test_native_reference_equals_checkpoint(folder, model, memory: str | None) -> None:
    how = LoadSettings(memory=memory, precision="int2", dense_precision="int4", context=64)
    with load_model(folder, how) as served:
        twin = native_reference(served, how)
        assert twin is not None
        with twin:
            ids = tokens(1, 9)
            assert differs_by(logits(twin.model, ids), logits(model, ids)) < 1e-4
            assert not torch.allclose(logits(served.model, ids), logits(model, ids), atol=1e-2)
            if memory is not None:
                both = twin.budget.total + served.budget.total_for_slots(served.budget.slots())
                assert both <= (8 << 30) + held_bytes(torch.device("cpu"))


def test_native_reference_is_none_without_memory(folder) -> None:
    plenty = LoadSettings(precision="int2", context=64)
    with load_model(folder, plenty) as served:
        tight = served.budget.total_for_slots(served.budget.slots()) + (1 << 20)
        how = LoadSettings(memory=tight, precision="int2", context=64)
        served.set_memory(tight)
        assert native_reference(served, how) is None


def test_native_reference_is_none_with_auto(folder) -> None:
    how = LoadSettings(memory="4GiB", precision="auto", context=64)
    with load_model(folder, how) as served:
        assert native_reference(served, how) is None
