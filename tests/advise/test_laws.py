"""Published laws against what their papers print, and their ranges."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.advise.forms import FORMS, Points, saturating_experts
from moefit.advise.laws import find_law, law_yaml, leverage_law, published_laws
from moefit.advise.shapes import Count, Shape, family
from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import ConfigError

# Ludziejewski et al., the law reduced to m N^mu + n D^nu + c: E, m, mu, n, nu.
REDUCED = (
    (1, 30.3640, -0.1817, 53.9838, -0.1965),
    (2, 27.7982, -0.1780, 66.8401, -0.2065),
    (4, 24.8462, -0.1731, 87.7022, -0.2192),
    (8, 21.8330, -0.1676, 119.9126, -0.2338),
    (16, 19.0159, -0.1617, 167.5073, -0.2494),
    (32, 16.5424, -0.1557, 234.6726, -0.2652),
)
# Krajewski et al., table 2: active parameters, tokens, granularity and loss of optimal models.
OPTIMA = (
    (100e6, 4.37e9, 8, 3.133),
    (1e9, 28.94e9, 16, 2.491),
    (3e9, 72.90e9, 16, 2.245),
    (7e9, 137.60e9, 32, 2.076),
    (70e9, 941.07e9, 32, 1.694),
    (300e9, 2.96e12, 64, 1.503),
    (1e12, 7.94e12, 64, 1.367),
)


def test_joint_law_has_the_printed_reduced_coefficients() -> None:
    c = published_laws()["ludziejewski"].coefficients
    for experts, m, mu, n, nu in REDUCED:
        e = saturating_experts(experts, c["start"], c["most"])
        assert c["a"] * e ** c["delta"] == pytest.approx(m, rel=0.003)
        assert c["alpha"] + c["gamma"] * math.log(e) == pytest.approx(mu, abs=1e-4)
        assert c["b"] * e ** c["omega"] == pytest.approx(n, rel=0.003)
        assert c["beta"] + c["zeta"] * math.log(e) == pytest.approx(nu, abs=2e-4)
        found = FORMS["joint"].loss(c, Points(parameters=3e8, tokens=2e10, experts=experts))
        assert found == pytest.approx(m * 3e8**mu + n * 2e10**nu + c["c"], abs=2e-3)


@pytest.mark.parametrize(
    ("experts", "parameters", "tokens"), [(1, 1.7e9, 9.7e9), (32, 669e6, 24.9e9)]
)
def test_joint_law_has_the_printed_optimum_at_1e20(
    experts: int, parameters: float, tokens: float
) -> None:
    law = published_laws()["ludziejewski"]
    sizes = np.geomspace(1e8, 1e10, 4001)
    points = Points(parameters=sizes, tokens=1e20 / 6 / sizes, experts=float(experts))
    best = int(np.argmin(law.formula.loss(law.coefficients, points)))
    assert sizes[best] == pytest.approx(parameters, rel=0.02)
    assert points.tokens[best] == pytest.approx(tokens, rel=0.02)


def test_fine_grained_law_has_the_printed_optima() -> None:
    law = published_laws()["krajewski"]
    for active, tokens, granularity, loss in OPTIMA:
        points = Points(
            parameters=(4 + 8 * 64) / 12 * active, tokens=tokens, granularity=float(granularity)
        )
        assert law.formula.loss(law.coefficients, points) == pytest.approx(loss, abs=0.03)


def test_efficiency_leverage_has_the_printed_example() -> None:
    formula = leverage_law().formula
    assert formula.leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.01)
    assert formula.best_granularity == pytest.approx(11.3, abs=0.05)
    shape = Shape(width=1024, layers=16, experts=8)
    leverage, outside = leverage_law().of(shape, 1e19)
    assert leverage > 1
    assert outside == ["granularity 0.667 is outside 2 to 16"]


def test_clark_law_matches_its_definition() -> None:
    law = published_laws()["clark-sbase"]
    c = law.coefficients
    shape = Shape(width=1024, layers=16, experts=64)
    n, e = math.log10(13 * 16 * 1024**2), math.log10(saturating_experts(64, 1.847, 314.478))
    expected = 10 ** (c["a"] * n + c["b"] * e + c["c"] * n * e + c["d"])
    assert law.loss(shape, 1e9) == pytest.approx(expected)
    assert law.loss(shape, 1e12) == law.loss(shape, 1e9)
    assert law.fixed_tokens == 130e9


def test_besiroglu_and_abnar_match_their_definitions() -> None:
    shape = Shape(width=768, layers=12)
    n, d = shape.active, 5e9
    expected = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    assert find_law("besiroglu").loss(shape, d) == pytest.approx(expected)
    sparse = Shape(width=768, layers=12, experts=16)
    total = sparse.count(Count.total)
    terms = 16612.5 / total**0.5962 + 5455.67 / d**0.3954 + 0.4598 * 16**-0.1666
    terms += 17.26 * 16**0.1603 / total**0.1595 + 0.94
    assert find_law("abnar").loss(sparse, d) == pytest.approx(terms)


@given(
    layers=st.integers(1, 40),
    experts=st.sampled_from([1, 2, 8, 32]),
    granularity=st.sampled_from([1, 2, 4]),
)
def test_counts_are_those_of_the_model_that_is_trained(
    layers: int, experts: int, granularity: int
) -> None:
    granularity = 1 if experts == 1 else granularity
    shape = Shape(width=64 * layers, layers=layers, experts=experts, granularity=granularity)
    config = DsMoeConfig(vocab_size=shape.vocabulary, **shape.model_fields(512))
    card = model_card(config)
    small = card.parameters.mlp_routers + card.parameters.norms
    assert shape.total == card.total - small
    assert shape.count(Count.total) == card.total_without_embeddings - small
    assert shape.count(Count.active) == card.active(card.training_rule) - small
    assert shape.active - shape.count(Count.active) == 2 * 50257 * shape.width


def test_family_is_that_of_the_law() -> None:
    first = list(family(8))[:16]
    assert [(one.width, one.layers) for one in first[::5]] == [
        (64, 1),
        (384, 6),
        (704, 11),
        (1024, 16),
    ]
    one = first[-1]
    assert one.active == 2 * 1024 * 50257 + 13 * 16 * 1024**2
    assert one.total == 2 * 1024 * 50257 + (4 + 9 * 8) * 16 * 1024**2
    expected = math.exp(8.39 - 0.81 * math.log(one.count(Count.active)) - 0.25 * math.log(8))
    assert one.learning_rate == pytest.approx(expected)
    assert first[0].learning_rate < 0.01  # far below the range of the rule


def test_warnings_and_refusal_outside_the_range() -> None:
    law = find_law("ludziejewski")
    inside = Shape(width=1024, layers=16, experts=8)
    assert law.warnings(inside, 2e10) == []
    warned = law.warnings(inside, 1.6e11)
    assert len(warned) == 2  # D, and D/N
    assert "D = 160 B is outside the 500 M to 80 B" in warned[0]
    assert not law.refuses(inside, 1.6e11)
    assert law.refuses(inside, 8.1e12)
    tiny = Shape(width=64, layers=1, vocabulary=300)
    assert law.refuses(tiny, 1e9)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ludziejewsky", "did you mean 'ludziejewski'"),
        ("yun", "not published; fit their form"),
        ("leverage", "predicts no loss"),
        ("missing.yaml", "cannot read the law"),
    ],
)
def test_unknown_laws_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_law(name)


def test_law_files(tmp_path: Path) -> None:
    import yaml

    tree = law_yaml(find_law("besiroglu"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    read = find_law(str(path))
    assert read == find_law("besiroglu")
    fields = tree["laws"]["besiroglu"]
    for change, words in (
        ({"form": "square"}, "not a form"),
        ({"coefficients": {"a": 1.0}}, "missing or unknown"),
        ({"counts": "all"}, "counts"),
        ({"ranges": {"tokens": [0, 0]}}, "tokens from 0 to 0 is not a range"),
        ({"ranges": {"tokens": [2, 1]}}, "tokens from 2 to 1 is not a range"),
        ({"fixed_tokens": -1}, "fixed_tokens.* greater than 0"),
    ):
        path.write_text(yaml.safe_dump({"laws": {"x": {**fields, **change}}}))
        with pytest.raises(ConfigError, match=words):
            find_law(str(path))
    clark = law_yaml(find_law("clark-rlr"))["laws"]["clark-rlr"]
    same = clark["coefficients"] | {"start": 300.0, "most": 300.0}
    path.write_text(yaml.safe_dump({"laws": {"x": clark | {"coefficients": same}}}))
    with pytest.raises(ConfigError, match="start 300 and most 300 must have 0 < start < most"):
        find_law(str(path))
    path.write_text("laws: {}")
    with pytest.raises(ConfigError, match="does not contain one law"):
        find_law(str(path))
