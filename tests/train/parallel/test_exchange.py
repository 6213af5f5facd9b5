"""Two ways of tokens to their experts, on two machines of two processes each."""

import json

import parallel_cases
import pytest
import torch
from processes import results
from transformers import AutoModelForCausalLM

from moefit.dsmoe.model import register
from moefit.train.config import make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train
from moefit.train.run_folder import read_log

register()


@pytest.fixture(scope="module")
def four(shared_folder):
    """What four processes find."""
    cases = ["limits", "ways:fp32", "ways:autocast", "ways:mixed", "long_way"]
    cases += [f"groups:{way}" for way in parallel_cases.GROUPS]
    cases += ["groups_run:groups:3"]
    return results(4, "parallel_cases", shared_folder, *cases)


@pytest.mark.slow
def test_both_ways_give_the_same_bits(four):
    """Logits of three steps, and gradients: sums are in the same order."""
    for name, (unequal, difference, *_) in four["ways:fp32"].items():
        assert unequal == 0, (name, difference)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "mixed"])
def test_in_16_bits_the_ways_differ_by_rounding_only(four, precision):
    """Numbers are below 4 in magnitude, and each sum that travels is rounded to 8 bits."""
    for name, (_, difference, *_) in four[f"ways:{precision}"].items():
        assert difference < 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize("way", ["long_way", *(f"groups:{way}" for way in parallel_cases.GROUPS)])
def test_every_layout_equals_one_process(four, way):
    """Experts are spread over all four processes, or over each of two groups."""
    for name, (numbers, parameters) in four[way].items():
        assert numbers < 1e-6, name
        assert parameters < 1e-9, name


@pytest.mark.slow
def test_tokens_use_experts_of_one_of_four_machines(four):
    own, one, free = (four["limits"][limit] for limit in ("own", "1", "None"))
    assert own["cross_node_share"] == 0
    for report in (one, free):
        assert report["cross_node_share"] == pytest.approx(0.75, abs=0.1)
    # Without a limit, 2 experts of a token are on 1.9 machines, as 1 pair in 7 is on one.
    assert one["cross_node_bytes"] < 0.65 * free["cross_node_bytes"]


@pytest.mark.slow
def test_a_machine_gets_one_copy_of_a_token_from_one_process(four):
    for name, (_, _, flat, long) in four["ways:fp32"].items():
        assert flat["cross_node_share"] == long["cross_node_share"], name
        assert flat["dropped_share"] == long["dropped_share"], name
    _, _, flat, long = four["ways:fp32"]["top 4"]
    # Per layer and step, 4 processes send to 2 or to 1 of the other machine: counts, rows there
    # and back, and gradients; the long way sends weights and places of rows too.
    assert flat["cross_node_messages"] == 2 * 4 * 2 * 5
    assert long["cross_node_messages"] == 2 * 4 * 1 * 8
    assert flat["dropped_share"] > 0
    # 16 (+ 1) tokens of 4 sequences, 2 layers: about 2 of 4 rows leave, or 1 copy of each token.
    values = 4 * 17 * 2 * 32 * 4 * 4
    assert flat["cross_node_bytes"] / values == pytest.approx(2, rel=0.1)
    assert long["cross_node_bytes"] / values == pytest.approx(1, rel=0.1)
    assert long["all_to_all_bytes"] > flat["all_to_all_bytes"]  # what is saved between machines


@pytest.mark.slow
def test_a_run_of_groups_goes_on_in_one_group_and_in_one_process(four, shared_folder):
    """The log and the last checkpoint are those of one process."""
    assert four["groups_run:groups:3"]
    results(2, "parallel_cases", shared_folder, "spread_run:groups:5")
    tree = parallel_cases.sparse(json.loads((shared_folder / "tree.json").read_text()))
    last, whole = (
        train(make_config({**tree, "out": str(shared_folder / name)}), NoDisplay()).checkpoint
        for name in ("groups", "whole")
    )
    found, expected = (
        {r["step"]: r["loss"] for r in read_log(shared_folder / name) if r["kind"] == "train"}
        for name in ("groups", "whole")
    )
    assert found == pytest.approx(expected, abs=1e-6)
    found, expected = (AutoModelForCausalLM.from_pretrained(one) for one in (last, whole))
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
