"""The dashboard for Grafana names metrics and labels that a server has."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from serving_http import client_of, fake_service

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana" / "moefit.json"
NAME = re.compile(r"moefit:\w+")
NAMED_LABELS = re.compile(r"(\w+)=~?\"|(\w+)!=\"|by \((\w+)\)|label_values\([^,]+, (\w+)\)")


def queries() -> list[tuple[str, str]]:
    """Return title and expression of every query."""
    board = json.loads(DASHBOARD.read_text())
    found = [("variable", one["query"]) for one in board["templating"]["list"]]
    for panel in board["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    return found


def served_metrics(served: Any, tmp_path: Path) -> dict[str, set[str]]:
    """Return the labels of every sample of a server that has been used, by name."""
    (tmp_path / "keys").write_text("keys: [{name: a, key: aa, operator: true}]")
    labels: dict[str, set[str]] = {}
    headers = {"Authorization": "Bearer aa"}
    with (
        fake_service(served, keys_file=tmp_path / "keys") as (service, _),
        client_of(service) as client,
    ):
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers=headers)
        service.telemetry.changed("ok")
        text = client.get("/metrics", headers=headers).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_every_metric_and_label_exists(served, tmp_path: Path) -> None:
    known = served_metrics(served, tmp_path)
    asked = [(title, query) for title, query in queries() if query != "prometheus"]
    assert len(asked) > 20
    for title, query in asked:
        names = NAME.findall(query)
        assert names, title
        for name in names:
            assert name in known, f"{title}: there is no {name}"
            wanted = {one for groups in NAMED_LABELS.findall(query) for one in groups if one}
            assert wanted <= known[name], (title, wanted - known[name])


def test_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [(one["gridPos"]["x"], one["gridPos"]["y"]) for one in panels]
    assert len({*places}) == len(places) == len({one["id"] for one in panels})
    assert all(one["gridPos"]["x"] + one["gridPos"]["w"] <= 24 for one in panels)
