"""Which experts are read again, decided without tensors."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import ConfigError
from moefit.moe.families import TensorSpec
from moefit.quant.format import FORMATS
from moefit.serve.config import LoadSettings, Policy
from moefit.serve.precision.allocate import AUTO_FORMATS
from moefit.serve.precision.refetch import (
    better_formats,
    heavily_weighted,
    largest_copy,
    worth_reading,
)

WEIGHTS = st.dictionaries(st.integers(0, 15), st.integers(0, 1000).map(float), max_size=8)


@given(st.lists(WEIGHTS, max_size=5), st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]))
def test_heavy_is_whoever_has_the_share_of_one_tokens_weight(choices, threshold) -> None:
    found = heavily_weighted(choices, threshold)
    for expert in range(16):
        shares = [
            Fraction(one[expert]) / Fraction(sum(one.values()))
            for one in choices
            if one.get(expert)
        ]
        assert (expert in found) == any(share >= threshold for share in shares)
    assert len(found) <= len(choices) * int(1 / threshold)


def test_weights_of_nothing_and_of_no_number_are_not_heavy() -> None:
    assert heavily_weighted([{0: 0.0, 1: 0.0}, {}], 0.1) == set()
    assert heavily_weighted([{0: float("nan"), 1: 1.0}], 0.1) == set()


@pytest.mark.parametrize("better", AUTO_FORMATS)
def test_what_is_as_good_already_is_not_read(better: str) -> None:
    experts = dict(enumerate(AUTO_FORMATS))
    found = worth_reading(experts, lambda expert: FORMATS[experts[expert]], FORMATS[better])
    assert {experts[expert] for expert in found} == set(AUTO_FORMATS[: AUTO_FORMATS.index(better)])


def packed(**formats: list[str]) -> Any:
    return SimpleNamespace(has=lambda block, format: format.name in formats[block])


def block(name: str, width: int = 64) -> Any:
    specs = {"w": TensorSpec((width, 64), torch.float32)}
    return SimpleNamespace(name=name, layout=SimpleNamespace(specs=specs))


def test_the_best_that_a_block_is_packed_in() -> None:
    blocks = [block("a"), block("b", 512)]
    found = better_formats(blocks, packed(a=["int2", "int8", "int3"], b=["int4"]))
    assert {name: format.name for name, format in found.items()} == {"a": "int8", "b": "int4"}
    assert largest_copy(blocks, found) == FORMATS["int4"].nbytes(blocks[1].layout.specs)


@pytest.mark.parametrize("formats", [[], ["int2"]])
def test_a_block_with_nothing_better_is_named(formats: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 blocks \(b\).*moefit pack MODEL --formats"):
        better_formats([block("a"), block("b")], packed(a=["int2", "int4"], b=formats))


@pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), True, "0.3"])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match="above 0, 1 at most"):
        Policy(refetch=share).check()
    with pytest.raises(ConfigError, match="above 0, 1 at most"):
        LoadSettings(refetch=share, precision="auto", memory="1GiB").check()


def test_it_belongs_to_precision_auto_and_the_exact_mode() -> None:
    LoadSettings(refetch=1, precision="auto", memory="1GiB").check()
    for precision in ("native", "int4"):
        with pytest.raises(ConfigError, match=f"precision '{precision}' all have the same"):
            LoadSettings(refetch=0.3, precision=precision, memory="1GiB").check()
    for mode in ("bounded", "virtual"):
        with pytest.raises(ConfigError, match=f"mode exact, and the mode is '{mode}'"):
            LoadSettings(refetch=0.3, precision="auto", memory="1GiB", mode=mode).check()
