"""Limit of tokens to the estimated context."""

import pytest
from tiny_served import logits, saved, tiny, tokens

from moefit.errors import ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = saved(tiny("Mixtral"), tmp_path_factory.mktemp("model"))
    with load_model(folder, LoadSettings(context=64)) as one:
        one.set_memory(one.budget.all_resident_bytes)
        yield one


def test_too_long_prompt_raises(served):
    with pytest.raises(ConfigError, match=r"hold 65 tokens.*reserves for 64.*context=65"):
        logits(served.model, tokens(1, 65))
    logits(served.model, tokens(1, 64))


def test_context_counts_all_sequences(served):
    logits(served.model, tokens(4, 16))
    with pytest.raises(ConfigError, match="would hold"):
        logits(served.model, tokens(5, 17))


def test_context_counts_cached_tokens(served):
    with pytest.raises(ConfigError, match="hold 65 tokens"):
        served.generate(tokens(1, 60), max_new_tokens=8, do_sample=False)
    assert served.generate(tokens(1, 60), max_new_tokens=4, do_sample=False).shape == (1, 64)


def test_no_context_limit_without_budget(served):
    total = served.budget.total
    served.set_memory(None)
    logits(served.model, tokens(1, 80))
    served.set_memory(total)
