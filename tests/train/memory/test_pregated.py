"""Pre-gated models: fine-tuned from others, with and without KL to the old routers."""

import pytest
import torch
from quick import slow_but
from tiny_models import tiny_model, tokens
from torch.nn import functional as F

from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError
from moefit.train import trainer
from moefit.train.config import make_config
from moefit.train.loop import train
from moefit.train.memory.early_routers import fit_routers
from moefit.train.memory.pregated import GateTeacher
from moefit.train.model import build_model
from moefit.train.parallel.processes import OneProcess
from moefit.train.run_folder import read_log


def test_loss_is_kl_to_the_old_routers_on_their_own_inputs() -> None:
    model = tiny_model(pregated=True, num_hidden_layers=3).train()
    teacher, inputs = GateTeacher(model, 0.5), []
    blocks = [one for one in model.modules() if isinstance(one, DsMoeBlock)]
    old = [block.gate.weight.detach().clone() for block in blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for block in blocks:
            block.gate.weight.add_(0.3)
            block.gate.weight.mul_(1.5)
    logits = model(tokens(2, 9), output_router_logits=True).router_logits
    expected = sum(
        (
            p_TE * (p_TE.log() - logits[at].log_softmax(-1))
        ).sum(-1).mean()
        for at in (1, 2)
        for p_TE in [F.linear(inputs[at], old[at]).softmax(-1).detach()]
    )  # fmt: skip
    loss = teacher.loss(logits)
    torch.testing.assert_close(loss, 0.5 * expected)
    loss.backward()
    assert all(block.gate.weight.grad.any() for block in blocks[1:])


def test_loss_of_previous_token_is_kl_in_every_block() -> None:
    model = tiny_model(pregated="previous_token", num_hidden_layers=3).train()
    teacher, inputs, ids_BT = GateTeacher(model, 0.5), [], tokens(2, 9)
    blocks = [one for one in model.modules() if isinstance(one, DsMoeBlock)]
    old = [block.gate.weight.detach().clone() for block in blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for block in blocks:
            block.gate.weight.mul_(1.5)
    logits = model(ids_BT, output_router_logits=True, use_cache=False).router_logits
    expected = torch.zeros(())
    for x_BTD, old_ED, block in zip(inputs, old, blocks, strict=True):
        p_BTE = F.linear(x_BTD, old_ED).softmax(-1).detach()
        new_BTE = block.gate(x_BTD).log_softmax(-1)
        new_BTE = torch.cat([new_BTE[:, :1], new_BTE[:, :-1]], dim=1)
        expected = expected + (p_BTE * (p_BTE.log() - new_BTE)).sum(-1).mean()
    loss = teacher.loss(logits)
    torch.testing.assert_close(loss, 0.5 * expected)
    loss.backward()
    assert all(block.gate.weight.grad.any() for block in blocks)


def test_routers_are_fitted_to_the_old_choice() -> None:
    """And nothing else changes."""
    found = []
    for count in (1, 12):
        model = tiny_model(pregated="previous_token_and_embedding", training_rule="top_k:2").train()
        before = {name: one.clone() for name, one in model.state_dict().items()}
        batches = (tokens(4, 17, seed=number) for number in range(count))
        found.append(fit_routers(model, batches, count, document_end=None))
        changed = {n for n, one in model.state_dict().items() if not torch.equal(one, before[n])}
        assert changed == {name for name in before if ".mlp.gate." in name}
        assert model.training and model.config.pregated == "previous_token_and_embedding"
        assert all(one.grad is None for one in model.parameters())
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize(
    "pregated",
    slow_but(
        ["previous_token_and_embedding"], [True, "previous_token", "previous_token_and_embedding"]
    ),
)
def test_fine_tune_of_another_model_begins_with_its_weights(
    tree, callback, tmp_path, pregated
) -> None:
    train(make_config(tree), callback)
    more = {**tree, "out": str(tmp_path / "more"), "start_from": tree["out"], "loss": {}}
    more["model"] = {**tree["model"], "pregated": pregated}
    result = train(make_config(more), callback)
    made = DsMoeForCausalLM.from_pretrained(result.checkpoint)
    assert made.config.pregated == pregated
    plain = [r["loss"] for r in read_log(tmp_path / "more") if r["kind"] == "train"]
    again = {**more, "start_from": more["out"], "loss": {"gate_kl": 0.5}}
    with pytest.raises(ConfigError, match=f"has pregated={pregated}, whose routers are given"):
        train(make_config({**again, "out": str(tmp_path / "again")}), callback)
    near = {**more, "out": str(tmp_path / "near"), "loss": {"gate_kl": 0.5}}
    train(make_config(near), callback)
    first, *_ = [r for r in read_log(tmp_path / "near") if r["kind"] == "train"]
    assert first["loss"] == pytest.approx(plain[0]) and first["router_loss"] > 0


def test_all_processes_learn_of_a_failure_of_fitting(tree, callback, monkeypatch) -> None:
    """Else the others would wait for the one in which it failed."""
    depths: list[int] = []

    class Watched(OneProcess):
        depth = 0

        def agreed(self, action):
            Watched.depth += 1
            try:
                return action()
            finally:
                Watched.depth -= 1

    monkeypatch.setattr(trainer, "fit_early_routers", lambda *_: depths.append(Watched.depth))
    train(make_config(tree), callback, Watched())
    assert depths == [2], "in the trainer, which is made by agreement as well"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"pregated": False}}, "only pre-gated routers differ"),
        ({"start_from": None}, "start_from, which is not given"),
        ({"compile": True}, "give compile=false"),
    ],
)
def test_kl_without_effect_is_refused(tree, changes, says) -> None:
    tree = {**tree, "start_from": "somewhere", "loss": {"gate_kl": 0.1}}
    tree["model"] = {**tree["model"], "pregated": True, **changes.pop("model", {})}
    config = make_config(tree | changes)
    model = build_model(config, vocab_size=300, eos_token_id=0)
    with pytest.raises(ConfigError, match=says):
        GateTeacher.of(config, model)


def test_olmoe_has_no_such_setting(tree) -> None:
    config = make_config({**tree, "model": {"architecture": "olmoe", "pregated": True}, "loss": {}})
    with pytest.raises(ConfigError, match=r"model\.pregated is not a field of OlmoeConfig"):
        build_model(config, vocab_size=300, eos_token_id=0)
