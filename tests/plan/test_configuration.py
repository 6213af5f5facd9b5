import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.plan.configuration import Configuration, configuration_from, uniform
from moefit.quant.format import FORMATS
from moefit.serve.config import BlockPlacement

NAMES = st.sampled_from(sorted(FORMATS))
BLOCKS = st.builds(
    lambda slots, formats: BlockPlacement(slots=slots, formats=tuple(formats)),
    st.integers(1, 9),
    st.lists(NAMES, min_size=1, max_size=9),
)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    return Configuration(
        placement=draw(st.dictionaries(st.text(max_size=5), BLOCKS, max_size=4)),
        dense_precision=draw(NAMES),
        mode=draw(st.sampled_from(["exact", "bounded", "virtual"])),
        bound=draw(st.floats(0, 1)),
        every=draw(st.integers(1, 99)),
    )


@given(configurations())
def test_configuration_round_trips(one: Configuration) -> None:
    assert configuration_from(json.loads(json.dumps(one.as_dict()))) == one


def test_parameters_of_other_modes_are_ignored() -> None:
    exact = uniform({"a": 4}, "int4", bound=0.3, every=8)
    assert exact.policy == uniform({"a": 4}, "int4").policy
    assert exact.policy_settings() == {"prefill": "exact"}


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (uniform({"a": 4, "b": 4}, "int4"), "8 int4, exact"),
        (
            uniform({"a": 4}, "int8", {"a": 2}, dense_precision="int8"),
            "2 int8, exact, dense weights int8",
        ),
        (uniform({"a": 4}, "int8", mode="bounded", bound=0.3), "4 int8, bounded 0.3"),
        (uniform({"a": 4}, "int8", mode="virtual", every=8), "4 int8, virtual, update every 8"),
    ],
)
def test_configuration_is_described(one: Configuration, words: str) -> None:
    assert one.describe() == words
