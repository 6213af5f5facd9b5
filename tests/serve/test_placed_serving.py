from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from serving import differs_by
from tiny_served import logits, saved, tiny, tokens

import moefit
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.config import BlockPlacement, Placement

IDS = tokens(1, 12)
FIRST, SECOND = (f"model.layers.{number}.mlp.experts" for number in range(2))
MIXED = ("native", "int8", "int8", "int4", "native", "int2", "int6", "int3")


@cache
def folder() -> Path:
    return saved(tiny("Mixtral"), Path(mkdtemp()) / "model")


def placed(first: BlockPlacement, second: BlockPlacement) -> Placement:
    return {FIRST: first, SECOND: second}


FEW = placed(
    BlockPlacement(slots=3, formats=("native",)), BlockPlacement(slots=6, formats=("native",))
)
SEATED = placed(BlockPlacement(slots=8, formats=MIXED), BlockPlacement(slots=2, formats=("int8",)))


def test_uneven_slots_equal_model() -> None:
    with moefit.load(folder(), placement=FEW) as served:
        assert differs_by(logits(served.model, IDS), logits(tiny("Mixtral"), IDS)) < 1e-4
        assert served.report()["slots"] == {FIRST: 3, SECOND: 6}
        served.check()


def test_experts_use_their_own_formats() -> None:
    x_TD = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    weights_TK = torch.ones(1, 1)
    with moefit.load(folder(), placement=SEATED) as served:
        assert served.report()["formats"][FIRST] == {
            name: MIXED.count(name) for name in dict.fromkeys(MIXED)
        }
        assert served.report()["resident"][FIRST] == list(range(8))
        for expert, format in enumerate(MIXED):
            ids_TK = torch.tensor([[expert]])
            with moefit.load(folder(), precision=format) as alone, torch.inference_mode():
                torch.testing.assert_close(
                    served.blocks[FIRST](x_TD, ids_TK, weights_TK),
                    alone.blocks[FIRST](x_TD, ids_TK, weights_TK),
                )
        logits(served.model, IDS)
        served.check()


@pytest.mark.parametrize("mode", ["bounded", "virtual"])
def test_fully_resident_blocks_stay_in_every_mode(mode: str) -> None:
    with moefit.load(folder(), placement=SEATED, mode=mode) as served:
        before = served.report()["formats"][FIRST]
        for seed in range(4):
            logits(served.model, tokens(1, 12, seed=seed))
        assert served.report()["formats"][FIRST] == before
        served.check()


def test_estimate_includes_placement_bytes() -> None:
    with moefit.load(folder(), placement=SEATED, memory="4GiB", context=64) as served:
        planned = served.budget.planned
        assert planned is not None
        assert served.report()["slot_bytes"] == planned.nbytes
        needed = served.budget.fixed + planned.nbytes
    with pytest.raises(BudgetTooSmallError, match=r"plan again"):
        moefit.load(folder(), placement=SEATED, memory=needed // 2, context=64)


def test_smaller_budget_drops_plan() -> None:
    with moefit.load(folder(), placement=SEATED, memory="4GiB", context=64) as served:
        served.set_memory("5GiB")
        assert served.report()["slots"] == {FIRST: 8, SECOND: 2}
        more = sum(one.block_slot_bytes for one in served.blocks.values())
        served.set_memory(served.budget.min_bytes + more)
        assert served.report()["slots"] == {FIRST: 2, SECOND: 2} and served.budget.planned is None
        logits(served.model, IDS)
        served.check()
        served.set_memory("4GiB")
        assert served.report()["slots"] == {FIRST: 8, SECOND: 8}
        logits(served.model, IDS)
        served.check()


def test_placement_with_precision_raises() -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        moefit.load(folder(), placement=FEW, precision="int4")
