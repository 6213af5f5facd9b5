"""A model kept between configurations equals one loaded for each."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from tiny_served import saved, tiny, tokens

from moefit.errors import BudgetTooSmallError
from moefit.plan.configuration import Configuration, uniform
from moefit.plan.measure import MeasuredModel, ModelCache
from moefit.serve.config import BlockPlacement
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel

INPUT = tokens(1, 20)
CONTEXT = 32


@cache
def subject() -> MeasuredModel:
    folder = Path(mkdtemp()) / "model"
    return MeasuredModel(folder=saved(tiny("Mixtral", initializer_range=0.1), folder))


def experts() -> dict[str, int]:
    return {block.name: block.num_experts for block in build_skeleton(subject().folder).blocks}


def configurations() -> list[Configuration]:
    """Native, a block in few bits, half of the experts, formats by expert, dense int8."""
    all_of = experts()
    native = uniform(all_of, "native")
    first, count = next(iter(all_of.items()))
    probe = {**native.placement, first: BlockPlacement(slots=count, formats=("int2",))}
    mixed = ("int8", "int3") * (count // 2)
    by_expert = {**native.placement, first: BlockPlacement(slots=count, formats=mixed)}
    return [
        native,
        replace(native, placement=probe),
        uniform(all_of, "int4", {name: max(1, count // 2) for name in all_of}),
        replace(native, placement=by_expert),
        native,
        uniform(all_of, "native", dense_precision="int8"),
        uniform(all_of, "int3", dense_precision="int8"),
    ]


@pytest.fixture
def kept() -> Iterator[ModelCache]:
    one = ModelCache(subject(), context=CONTEXT)
    yield one
    one.close()


def logits(served: ServedModel) -> torch.Tensor:
    with torch.inference_mode():
        return served.model(input_ids=INPUT).logits


def test_cached_model_equals_newly_loaded(kept: ModelCache) -> None:
    for configuration in configurations():
        served = kept.served(configuration)
        got = logits(served)
        served.check()
        with subject().load(configuration, context=CONTEXT) as fresh:
            assert torch.equal(got, logits(fresh)), configuration.describe()


def test_model_is_reloaded_only_for_other_dense_precision(kept: ModelCache) -> None:
    found = [kept.served(configuration) for configuration in configurations()]
    assert len({id(one) for one in found[:5]}) == 1
    assert len({id(one) for one in found}) == 2 and found[5] is found[6]


def test_model_that_fails_to_change_is_dropped(
    kept: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = configurations()[0]
    before = kept.served(native)

    def refuse(*_: object, **__: object) -> None:
        raise BudgetTooSmallError("no")

    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "set_placement", refuse)
        with pytest.raises(BudgetTooSmallError):
            kept.served(native)
    assert kept.served(native) is not before
