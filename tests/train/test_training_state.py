from dataclasses import replace

import pytest
import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.train import checkpoint
from moefit.train.data.tokenizer import train_bpe
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.state import RunState
from moefit.train.settings import OptimizerConfig

ONE = {"training_rule": "top_k:1", "inference_rule": "top_k:1"}


def make_state(hidden_size=16, **settings):
    config = DsMoeConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_experts=2,
        **settings,
    )
    model = DsMoeForCausalLM(config)
    return RunState(
        model=model,
        optimizer=make_optimizer(model, OptimizerConfig()),
        device=torch.device("cpu"),
        precision="fp32",
        fingerprint="aaaa",
    )


def save(out, state, packed):
    tokenizer = train_bpe(["some text"], 300)
    snapshot = checkpoint.Snapshot(step=5, model=state.model, tokenizer=tokenizer, state=packed)
    return checkpoint.save(out, snapshot, keep=2)


@pytest.fixture
def state():
    return make_state()


@pytest.fixture
def saved(tmp_path, state):
    return save(tmp_path, state, state.state_dict(1.5))


def test_state_round_trips(saved, state):
    expected = torch.rand(3)  # what follows the moment of saving
    other = make_state()
    assert other.restore(saved) == (5, 1.5)
    assert torch.equal(torch.rand(3), expected)
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name])


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"router_type": "hash", **ONE}, {"router_type": "grap", **ONE}, "has router_type=hash"),
        ({}, {"pregated": "previous_token"}, "has pregated=False, not previous_token"),
        ({}, {"score_correction_bias": True, **ONE}, "e_score_correction_bias"),
    ],
)
def test_routers_that_choose_otherwise_raise(tmp_path, before, now, message):
    """The first two have weights of the same names and shapes."""
    state = make_state(**before)
    saved = save(tmp_path, state, state.state_dict(1.5))
    with pytest.raises(CheckpointError, match=message):
        make_state(**now).restore(saved)


def test_changed_data_raises(saved, state):
    with pytest.raises(DataError, match=r"since step 5.*was aaaa and is bbbb; restore"):
        replace(state, fingerprint="bbbb").restore(saved)


def test_changed_precision_raises(saved, state):
    with pytest.raises(ConfigError, match=r"in fp32, but .* bf16 on cpu; give precision=fp32"):
        replace(state, precision="bf16").restore(saved)


def test_changed_model_raises(saved):
    with pytest.raises(CheckpointError, match="not of the model that these settings describe"):
        make_state(hidden_size=32).restore(saved)


def test_old_checkpoints_without_fingerprint_resume(tmp_path, state):
    packed = state.state_dict(1.5)
    del packed["data"], packed["precision"]
    assert state.restore(save(tmp_path, state, packed)) == (5, 1.5)


def test_resume_from_cpu_on_gpu(saved, state, monkeypatch):
    """A CPU's checkpoint has no state of a GPU's generator, which is then seeded."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    for _ in range(2):
        assert replace(state, device=torch.device("cuda")).restore(saved) == (5, 1.5)
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]
