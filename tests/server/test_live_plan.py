"""A server with a plan replans for another budget, or leaves everything unchanged."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from threading import Event, Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from planned import planned_model, profile
from serving_http import client_of, error_of, fake_service
from tiny_served import saved

import moefit
from moefit.cli.budget import memory_table
from moefit.errors import ConfigError
from moefit.plan.plan_file import Plan, Target
from moefit.plan.planner import Planner
from moefit.plan.search import PlanConstraints
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.server.service import LivePlan, Service

URL, CONTEXT = "/v1/memory", 64
BEST = Target(min_speed=0.001)  # the least loss that there is room for


@cache
def folder() -> Path:
    return saved(planned_model(), Path(mkdtemp()) / "model")


class Maker:
    """Plan as the command does, in this process, for a model of the served size."""

    def __init__(self, process: int):
        self.asked: list[int] = []
        self.fail: Exception | None = None
        self.began, self.open = Event(), Event()
        self.open.set()
        self.changes: dict[str, Any] = {}
        given = PlanConstraints(process=process, dense_formats=("native",))
        self.planner = Planner(
            build_skeleton(folder()), profile(), context=CONTEXT, constraints=given
        )

    def __call__(self, memory: int) -> Plan:
        self.asked.append(memory)
        self.began.set()
        self.open.wait(20)
        if self.fail is not None:
            raise self.fail
        return replace(self.planner.plan(memory, BEST)[0], **self.changes)


@pytest.fixture
def planned() -> Iterator[tuple[TestClient, ServedModel, Service, Maker]]:
    begun = Maker(process=0)
    plan = begun.planner.plan(begun.planner.slot_budgets.all_resident_bytes, BEST)[0]
    with moefit.load(folder(), **{**plan.settings(), "memory": "6GiB"}) as served:
        make = Maker(served.budget.process)
        with fake_service(served) as (service, engine):
            service.live_plan = LivePlan(engine, plan, make)  # pyright: ignore[reportArgumentType]
            with client_of(service) as client:
                yield client, served, service, make


def test_changed_budget_is_planned(planned) -> None:
    client, served, service, make = planned
    before = client.get(URL).json()
    low, high = make.planner.slot_budgets.min_bytes, make.planner.slot_budgets.all_resident_bytes
    assert (before["floor"], before["everything"], before["most"]) == (low, high, high)
    assert before["plan"]["tokens_per_second"] > 0
    seen = set()
    for memory in (low + (high - low) // 3, low + 2 * (high - low) // 3, high):
        after = client.post(URL, json={"bytes": memory}).json()
        plan = service.live_plan.plan
        assert make.asked[-1] == memory == after["budget"]["total"] == plan.memory
        assert after["plan"]["words"] == plan.configuration.describe()
        assert {b["name"]: b["slots"] for b in after["blocks"]} == {
            name: one.slots for name, one in plan.configuration.placement.items()
        }
        assert after["mode"] == plan.configuration.mode
        served.check()
        seen.add(after["plan"]["words"])
    assert len(seen) == 3
    assert before["floor"] == client.get(URL).json()["floor"]
    assert "predicted loss" in [str(cell) for cell in memory_table(after).columns[0].cells]


def test_maximum_budget_is_planned(planned) -> None:
    client, served, _, make = planned
    after = client.post(URL, json={"bytes": None}).json()
    assert after["budget"]["total"] is None
    assert make.asked == [make.planner.slot_budgets.all_resident_bytes]
    served.check()


def test_unreachable_target_changes_nothing(planned) -> None:
    client, served, service, make = planned
    before = client.get(URL).json()
    make.fail = ConfigError("a loss of at most 3% cannot be promised")
    error = error_of(client.post(URL, json={"bytes": "5GiB"}), 400)
    assert "cannot be promised; give a mode with the budget" in error["message"]
    after = client.get(URL).json()
    for name in ("budget", "plan", "mode", "slot_bytes"):
        assert after[name] == before[name]
    assert service.telemetry.changes == {"refused": 1}
    less = (served.budget.fixed + served.budget.planned.nbytes) - 1
    done = client.post(URL, json={"bytes": less, "mode": "exact"}).json()
    assert done["budget"]["total"] == less and done["plan"] is None
    served.check()


def test_manual_mode_drops_plan(planned) -> None:
    client, _, _, make = planned
    after = client.post(URL, json={"mode": "virtual"}).json()
    assert after["mode"] == "virtual" and after["plan"] is None and not make.asked
    again = client.post(URL, json={"bytes": "5GiB"}).json()
    assert again["plan"] is not None and make.asked == [5 << 30]


def test_failed_manual_change_keeps_plan(planned) -> None:
    client, served, _, make = planned
    before = client.get(URL).json()
    error_of(client.post(URL, json={"bytes": served.budget.min_bytes - 1, "mode": "virtual"}), 400)
    after = client.get(URL).json()
    for name in ("budget", "plan", "mode", "prefill", "slot_bytes"):
        assert after[name] == before[name]
    assert after["plan"] is not None and not make.asked


@pytest.mark.parametrize("bytes", ["much", 0, "0"])
def test_invalid_size_is_not_planned(planned, bytes) -> None:
    client, _, _, make = planned
    error_of(client.post(URL, json={"bytes": bytes}), 400)
    assert not make.asked


def test_plan_for_another_rule_raises(planned) -> None:
    client, _, _, make = planned
    make.changes = {"rule": "top_k:1"}
    error = error_of(client.post(URL, json={"bytes": "5GiB"}), 400)
    assert "top_k:1" in error["message"] and "moefit profile" in error["message"]


def test_planning_is_serialised_and_state_readable(planned) -> None:
    client, _, _, make = planned
    make.open.clear()
    first: list[Any] = []
    asking = Thread(target=lambda: first.append(client.post(URL, json={"bytes": "5GiB"})))
    asking.start()
    assert make.began.wait(20)
    assert error_of(client.post(URL, json={"bytes": "4GiB"}), 409)["code"] == "busy"
    assert client.get(URL).json()["budget"]["total"] == 6 << 30
    make.open.set()
    asking.join()
    assert first[0].json()["budget"]["total"] == 5 << 30
