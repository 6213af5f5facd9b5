"""Output of `moefit plan`; test_plan_command.py tests the command."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from planned import planned_model, profile
from tiny_served import saved

from moefit.cli.plan_tables import plan_dict, print_plan
from moefit.plan.planner import Planner
from moefit.serve.hf.skeleton import build_skeleton


@cache
def planner() -> Planner:
    skeleton = build_skeleton(saved(planned_model(), Path(mkdtemp())))
    return Planner(skeleton, profile(), context=64)


def test_json_has_plain_values() -> None:
    one = planner()
    plan, front = one.plan(one.slot_budgets.all_resident_bytes)
    shown = json.loads(
        json.dumps(plan_dict(one, plan, front, {one.slot_budgets.all_resident_bytes: front}))
    )
    assert shown["plan"] == json.loads(json.dumps(plan.as_dict()))
    assert len(shown["front"]) == len(front) > 0
    assert shown["budgets"] == [
        {"memory": one.slot_budgets.all_resident_bytes, "front": shown["front"]}
    ]
    assert (shown["floor"], shown["everything"]) == (
        one.slot_budgets.min_bytes,
        one.slot_budgets.all_resident_bytes,
    )
    assert plan_dict(one, None, [], {})["plan"] is None


@pytest.mark.parametrize("smallest", [False, True])
def test_tables_show_plan_and_errors(capsys, smallest: bool) -> None:
    one = planner()
    plan, _ = one.plan(one.slot_budgets.all_resident_bytes)
    print_plan(one, plan, {}, "a-model", smallest=smallest)
    told = "".join(capsys.readouterr())
    assert "a-model in" in told and "quality models" in told and "speed models" in told
    assert ("this is the smallest budget that meets the target" in told) == smallest


def test_tables_without_plan_show_budgets(capsys) -> None:
    print_plan(planner(), None, {}, "a-model", smallest=True)
    told = "".join(capsys.readouterr())
    assert "a-model in" not in told and "smallest budget for a loss of 1%" in told
