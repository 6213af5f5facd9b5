"""Yun et al.'s two algorithms against brute force, the front, and what no model can serve."""

from dataclasses import replace

import pytest

from moefit.advise.hardware import Device, known_devices
from moefit.advise.laws import find_law
from moefit.advise.recommend import Advice, Algorithm, advise
from moefit.advise.run_config import train_config
from moefit.advise.search import Question, best_quality, candidates, least_cost, pareto_front
from moefit.advise.serving import PRECISIONS, Limits
from moefit.advise.shapes import family
from moefit.advise.throughput import Traffic
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.train.config import make_config

LAPTOP = Device(
    name="laptop",
    memory=16 << 30,
    bandwidth=20e9,
    flops=2e11,
    source="test",
    rates=dict.fromkeys(PRECISIONS, 15e9),
    is_gpu=False,
)
QUESTION = Question(
    law=find_law("ludziejewski"),
    flops=1e21,
    device=LAPTOP,
    limits=Limits(memory=12 << 30, min_speed=10.0),
)
SMALL = replace(QUESTION, flops=3e18, limits=Limits(memory=1 << 30, min_speed=100.0))
"""A question that brute force can answer."""


def brute_force(question: Question) -> list:
    """Return all models of the family in all precisions that can be served."""
    found = []
    for experts in question.law.experts:
        for shape in list(family(experts, 1, question.vocabulary))[:30]:
            if question.loss(shape) < 100:
                served = (question.served(shape, precision) for precision in question.precisions)
                found += [one for one in served if one is not None]
    return found


@pytest.fixture(scope="module")
def answer() -> Advice:
    """The answer to `QUESTION`: 12 GiB, 10 tokens/s on a laptop, 1e21 FLOPs."""
    return advise(QUESTION)


def test_best_quality_is_that_of_brute_force() -> None:
    found = best_quality(SMALL)
    best = min(one.loss for one in brute_force(SMALL))
    assert found.loss == pytest.approx(best, abs=1e-12)
    assert found.memory.resident <= 1 << 30
    assert found.speed >= 100


def test_least_cost_is_that_of_brute_force() -> None:
    target = SMALL.loss(SMALL.optimal((1, 1)))
    found = least_cost(SMALL, target)
    cheapest = min(one.cost for one in brute_force(SMALL) if one.loss <= target)
    assert found.cost == pytest.approx(cheapest, rel=1e-12)
    assert found.loss <= target
    # Yun et al.: experts reach a dense model's loss at less serving cost.
    assert found.shape.experts > 1
    assert found.shape.active < SMALL.optimal((1, 1)).active


def test_front_has_no_point_that_another_beats() -> None:
    everything = list(candidates(SMALL))
    front = pareto_front(everything)
    assert 3 < len(front) < len(everything)
    for one in front:
        assert not any(
            other.loss <= one.loss and other.cost <= one.cost and other != one
            for other in everything
            if (other.loss, other.cost) != (one.loss, one.cost)
        )


def test_example_of_a_laptop(answer: Advice) -> None:
    chosen = answer.chosen
    assert chosen.memory.resident <= 12 << 30
    assert chosen.speed >= 10
    assert chosen.shape.training_flops(chosen.tokens) == pytest.approx(1e21)
    assert chosen.shape.experts == 32
    assert answer.limited_by.startswith("the memory: the next larger one takes 12.")
    assert [one.shape.experts for one in answer.by_experts] == [1, 2, 4, 8, 16, 32]
    assert answer.front[-1].loss == chosen.loss
    assert any("total parameters" in one for one in answer.warnings)
    assert answer.leverage > 1


def test_over_training_of_a_laptop(answer: Advice) -> None:
    """What it costs and saves, against the loss-optimal model, by its definitions."""
    over, chosen = answer.over_training, answer.chosen
    assert over is not None
    assert over.optimal == QUESTION.optimal((32, 1))
    assert over.loss == pytest.approx(chosen.law_loss - QUESTION.loss(over.optimal))
    assert over.resident > 12 << 30
    assert over.speed < chosen.speed
    less = replace(QUESTION, flops=over.compute_share * 1e21)
    assert less.loss(less.optimal((32, 1))) == pytest.approx(chosen.law_loss, abs=1e-6)
    assert over.compute_share < 1


def test_other_laws_have_opinions(answer: Advice) -> None:
    opinions = {one.law: one for one in answer.opinions}
    assert opinions["clark-sbase"].choice is not None
    assert 0 < (opinions["clark-sbase"].regret or 0) < 0.1
    assert opinions["clark-sbase"].tokens == 130e9
    assert opinions["clark-sbase"].reason.startswith("ignores tokens")
    krajewski = opinions["krajewski"].choice
    assert krajewski is not None
    assert krajewski.experts == 64
    assert krajewski.granularity > 1
    assert opinions["krajewski"].regret is None
    assert opinions["abnar"].regret is None
    assert "ranks" in opinions["abnar"].reason
    assert opinions["besiroglu"].choice is not None
    assert opinions["besiroglu"].choice.experts == 1


def test_recommendation_is_a_run(answer: Advice) -> None:
    config = make_config(train_config(answer.chosen))
    tokens = config.steps * config.seq_len * config.batch_size * config.accumulation
    assert tokens == pytest.approx(answer.chosen.tokens, rel=0.01)
    settings = config.model.settings
    assert settings["num_experts"] == 32
    assert settings["training_rule"] == "top_k:1"
    assert config.loss.load_balancing == 0.01
    assert config.optimizer.lr == pytest.approx(answer.chosen.shape.learning_rate, rel=0.01)


def test_granularity_is_recommended_by_a_law_that_has_it() -> None:
    question = replace(
        QUESTION,
        law=find_law("krajewski"),
        limits=Limits(memory=12 << 30),
        precisions=("int4",),
    )
    found = best_quality(question)
    shape = found.shape
    assert shape.granularity == 16
    assert shape.num_experts == 64 * 16
    assert shape.top_k == 16
    settings = make_config(train_config(found)).model.settings
    assert settings["training_rule"] == "top_k:16"
    assert settings["intermediate_size"] == 3 * shape.width // 16


def test_tokens_may_run_out() -> None:
    limited = replace(QUESTION, max_tokens=20e9)
    found = best_quality(limited)
    assert found.tokens == 20e9
    assert found.law_loss > best_quality(QUESTION).law_loss
    assert found.shape.training_flops(found.tokens) < 1e21


def test_traffic_costs_device_seconds() -> None:
    traffic = Traffic(requests=20.0, devices=4)
    question = replace(QUESTION, device=known_devices()["h100"], limits=Limits(), traffic=traffic)
    found = best_quality(question)
    assert found.traffic is not None
    assert found.cost == found.traffic.device_seconds
    assert found.traffic.capacity >= 20 * 256
    target = question.loss(question.optimal((4, 1)))
    cheap = least_cost(question, target)
    assert cheap.cost < found.cost
    assert cheap.loss <= target


def test_least_cost_matches_another_number_of_experts() -> None:
    advice = advise(SMALL, Algorithm.least_cost, match_experts=4)
    assert advice.target == SMALL.loss(SMALL.optimal((4, 1)))
    assert advice.chosen.loss <= advice.target
    with pytest.raises(ConfigError, match=r"it has for 1, 2, 4, 8, 16, 32"):
        advise(SMALL, Algorithm.least_cost, match_experts=3)


def test_budget_below_the_smallest_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"smallest has 6.49 M active .*give at least 2e\+14"):
        best_quality(replace(QUESTION, flops=1e12))
    assert best_quality(replace(QUESTION, flops=2e14)).tokens == pytest.approx(5e6, rel=0.05)


def test_budget_far_above_a_laws_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"refused beyond 100 times.*give at most 1.2e\+25"):
        best_quality(replace(QUESTION, flops=1e28))
    roomy = replace(QUESTION, flops=1.2e25, limits=Limits(memory=1 << 50))
    assert best_quality(roomy).law_loss < 2
    with pytest.raises(ConfigError, match=r"1 k training tokens are too few.*from 5 M on"):
        best_quality(replace(QUESTION, max_tokens=1e3))


def test_law_with_fixed_tokens_names_its_budget() -> None:
    question = replace(QUESTION, law=find_law("clark-hash"), flops=1e16)
    with pytest.raises(ConfigError, match=r"needs 130 B tokens: give at least"):
        best_quality(question)


@pytest.mark.parametrize(
    ("limits", "traffic", "error", "words"),
    [
        (
            Limits(memory=100 << 20),
            None,
            BudgetTooSmallError,
            r"fits in 100 MiB \(104857600 bytes\); .* at least \d+ bytes, such as",
        ),
        (Limits(min_speed=1e6), None, ConfigError, r"decodes 1e.06 tokens/s.*--min-speed \d+,"),
        (
            Limits(),
            Traffic(requests=1e7),
            ConfigError,
            r"1e\+07 requests/s .* serves at most .*give --requests",
        ),
    ],
)
def test_limits_that_no_model_meets(limits, traffic, error, words: str) -> None:
    question = replace(SMALL, limits=limits, traffic=traffic)
    with pytest.raises(error, match=words):
        best_quality(question)


def test_memory_for_traffic_is_that_of_each_device() -> None:
    """Of three devices, two share one copy, which needs room for one sequence's cache."""
    question = replace(
        SMALL, precisions=("int8",), traffic=Traffic(requests=1e-9, prompt=1e4, devices=3)
    )
    shape = question.families[1, 1][0]
    least = question.least_memory(shape, "int8")
    below = replace(question, limits=Limits(memory=least - 1))
    assert replace(question, limits=Limits(memory=least)).fitting(shape, "int8") is not None
    assert below.fitting(shape, "int8") is None
    with pytest.raises(BudgetTooSmallError, match=rf"at least {least} bytes.* each of 3 devices"):
        best_quality(below)


def test_memory_with_experts_in_storage_is_that_of_their_slots() -> None:
    shape = SMALL.families[32, 1][5]
    limits = Limits(storage_bandwidth=1e9)
    least = replace(SMALL, limits=limits).least_memory(shape, "int8")
    assert least < replace(SMALL, limits=Limits()).least_memory(shape, "int8")
    for memory in (least - 1, least):
        question = replace(SMALL, limits=replace(limits, memory=memory))
        assert (question.fitting(shape, "int8") is None) == (memory < least)


def test_loss_that_no_model_has_names_the_lowest() -> None:
    best = best_quality(SMALL)
    with pytest.raises(ConfigError, match=rf"the lowest is {best.loss:.4f}"):
        least_cost(SMALL, 1.5)
