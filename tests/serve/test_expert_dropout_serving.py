"""Models trained with experts absent: virtual mode holds the first ones of their order."""

import json

import pytest
import torch
from serving import give_slots, logits, saved, serving
from tiny_models import tiny_model, tokens

from moefit.cli.loading import dropout_line
from moefit.errors import CheckpointError
from moefit.evaluate.baselines import fix_residents
from moefit.moe.expert_dropout import ExpertDropoutRecord, dropout_record, order_of_blocks
from moefit.serve.config import BlockPlacement, LoadSettings
from moefit.serve.load import load_model

ORDER = ((3, 1, 4, 0, 2), (2, 0, 1, 3, 4))
RECORD = ExpertDropoutRecord(
    order="nested", share=0.5, least=2, begin=0.6, resident_order=ORDER,
    held_out_loss={5: 2.0, 3: 2.01, 2: 2.05},
)  # fmt: skip


def trained(**changes):
    model = tiny_model(inference_rule="top_k:2:renormalize", **changes)
    model.config.expert_dropout = RECORD.as_dict()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(trained(), tmp_path_factory.mktemp("dropout"))


def residents(served):
    for experts in served.blocks.values():
        experts.swaps.settle()
    return [set(experts.slot_table.residents) for experts in served.blocks.values()]


def first(count):
    return [set(order[:count]) for order in ORDER]


def test_virtual_mode_starts_with_first_in_order(folder):
    with load_model(folder, LoadSettings()) as served:
        placement = {name: BlockPlacement(slots=3, formats=("native",)) for name in served.blocks}
    with load_model(folder, LoadSettings(placement=placement, mode="virtual")) as served:
        assert residents(served) == first(3)
        served.check()
    with load_model(folder, LoadSettings(placement=placement)) as served:
        assert residents(served) == [set(), set()]  # exact mode loads what is asked for
        served.set_mode("virtual", residency="fixed")
        assert residents(served) == first(3)
        served.set_residents(dict.fromkeys(served.blocks, (0, 4)))
        served.set_mode("virtual", residency="fixed", bound=0.1)
        assert residents(served) == [{0, 4}] * 2  # it was virtual already
        served.check()


def test_more_memory_keeps_order(folder):
    with serving(folder, slots=2) as served:
        served.set_mode("virtual", residency="fixed")
        assert residents(served) == first(2)
        give_slots(served, 4)
        assert residents(served) == first(4)


def test_a_nested_model_keeps_its_order_at_every_budget(folder):
    """Virtual mode swaps nothing, whatever the router would like; exact mode caches as usual."""
    with serving(folder, slots=3) as served:
        assert served.set_mode("virtual").residency == "fixed"
        for _ in range(5):
            logits(served.model, {"input_ids": tokens(1, 9)})
        assert residents(served) == first(3)
        for slots in (4, 2, 1, 3):
            give_slots(served, slots)
            assert residents(served) == first(slots)
        assert served.set_mode("exact").residency == "manager"
        give_slots(served, 4)
        assert served.set_mode("virtual", residency="manager").residency == "manager"


def test_a_mixed_model_swaps(tmp_path):
    model = trained()
    model.config.expert_dropout["order"] = "mixed"
    with serving(saved(model, tmp_path), slots=3) as served:
        assert served.set_mode("virtual").residency == "manager"
        assert residents(served) == first(3)
        for seed in range(8):
            logits(served.model, {"input_ids": tokens(1, 9, seed=seed)})
        assert residents(served) != first(3)


def test_all_experts_are_held(folder):
    with serving(folder, slots=5) as served:
        served.set_mode("virtual")
        assert residents(served) == first(5)
        before = served.report()["fetches"]
        assert torch.allclose(
            logits(served.model, {"input_ids": tokens(1, 7)}),
            logits(trained(), {"input_ids": tokens(1, 7)}),
            atol=1e-4,
        )
        assert served.report()["fetches"] == before


def test_served_output_equals_training(folder):
    """The model itself, limited to the first three experts, is the slow version."""
    ids = tokens(2, 9)
    allowed_LBE = torch.zeros(2, 2, 5, dtype=torch.bool)
    for allowed_BE, order in zip(allowed_LBE, ORDER, strict=True):
        allowed_BE[:, list(order[:3])] = True
    expected = logits(trained(), {"input_ids": ids, "allowed_LBE": allowed_LBE})
    with serving(folder, slots=3) as served:
        served.set_mode("virtual", residency="fixed")
        assert torch.allclose(logits(served.model, {"input_ids": ids}), expected, atol=1e-4)


def test_baseline_ignores_order(folder):
    with serving(folder, slots=2) as served:
        chosen = fix_residents(served, "random", seed=3)
        assert residents(served) == [set(one) for one in chosen.values()] != first(2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"resident_order": [[0, 1, 2, 3, 4]]}, r"orders \[5\] experts per layer, .* has \[5, 5\]"),
        ({"resident_order": [[0, 0, 2, 3, 4]] * 2}, "is damaged"),
        ({"order": "sorted"}, "is damaged"),
    ],
)
def test_record_of_another_model_raises(tmp_path, entry, message):
    folder = saved(trained(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["expert_dropout"] |= entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, LoadSettings())


def test_start_message():
    line = dropout_line(RECORD, "exact")
    assert line.endswith("3 of 5 experts +1.0%, 2 +5.1%; recommended: --mode virtual")
    assert "recommended" not in dropout_line(RECORD, "virtual")
    assert dropout_line(None) == ""
    assert dropout_record(trained().config) == RECORD
    assert order_of_blocks(RECORD, [5, 5]) == list(ORDER)
