from dataclasses import replace
from types import SimpleNamespace

import pytest

from moefit.errors import CheckpointError
from moefit.moe.expert_dropout import ExpertDropoutRecord, dropout_record, order_of_blocks

RECORD = ExpertDropoutRecord(
    order="nested",
    share=0.5,
    least=2,
    begin=0.6,
    resident_order=((1, 0, 2), (2, 1, 0)),
    held_out_loss={3: 2.0, 2: 2.1},
)


def config(entry):
    return SimpleNamespace(expert_dropout=entry)


def test_record_round_trips():
    assert dropout_record(config(RECORD.as_dict())) == RECORD
    assert dropout_record(SimpleNamespace()) is None


def test_costs_are_relative_perplexities():
    assert RECORD.costs() == {3: 0, 2: pytest.approx(0.10517, abs=1e-5)}


def test_model_card_says_what_each_budget_costs():
    text = RECORD.model_card()
    assert "expert dropout (nested): in 50% of the sequences, from 60% of the training on" in text
    assert text.endswith("|---|---|\n| 3 of 3 | +0.0% |\n| 2 of 3 | +10.5% |\n")
    assert "|" not in replace(RECORD, held_out_loss=None).model_card()


@pytest.mark.parametrize(
    "damage",
    [
        {"order": "best"},
        {"order": None},
        {"share": "half"},
        {"resident_order": [[0, 0, 1]]},
        {"resident_order": [[0, 1, 3]]},
        {"resident_order": 3},
        {"held_out_loss": {"many": 1.0}},
        {"held_out_loss": [1.0]},
    ],
)
def test_damaged_record_raises(damage):
    with pytest.raises(CheckpointError, match=r"expert_dropout in config.json is damaged"):
        dropout_record(config(RECORD.as_dict() | damage))
    with pytest.raises(CheckpointError):
        dropout_record(config("nested"))


def test_order_is_mapped_to_blocks():
    assert order_of_blocks(RECORD, [3, 3]) == [(1, 0, 2), (2, 1, 0)]
    assert order_of_blocks(None, [3, 3]) == [None, None]
    with pytest.raises(CheckpointError, match=r"orders \[3, 3\] .* model has \[3, 3, 3\]"):
        order_of_blocks(RECORD, [3, 3, 3])
