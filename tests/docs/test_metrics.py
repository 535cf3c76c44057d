"""The metrics in the documentation, in the alerts and on the dashboard are those that the server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.frontends.http.metrics import METRICS
from instep_client.protocol.codes import Code, Place
from tests.docs.support.page import Page

DEPLOY = Path(__file__).parents[2] / "deploy"
PAGE = Page("operations.md")
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "instep.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
BY_NAME = {metric.name: metric for metric in METRICS}
LABELS = {"instance", "job", *(label for metric in METRICS for label in metric.labels)}


def panels(of: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All panels, those in rows that are closed too."""
    for panel in of:
        yield panel
        yield from panels(panel.get("panels", []))


QUERIES = [target["expr"] for panel in panels(DASHBOARD["panels"]) for target in panel.get("targets", [])]
ALERTED = [rule["expr"] for rule in RULES]


def test_the_table_of_metrics_is_that_of_the_program() -> None:
    assert PAGE.table("Metrics", "metric").rows == [
        (metric.name, metric.type, ", ".join(metric.labels), metric.help) for metric in METRICS
    ]


@pytest.mark.parametrize("query", sorted({*QUERIES, *ALERTED}))
def test_queries_name_metrics_by_their_type_and_labels_with_values_that_exist(query: str) -> None:
    names = re.findall(r"\binstep_\w+", query)
    assert names or re.search(r"\b(process_\w+|up)\b", query)
    for name in names:
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert BY_NAME[family].type in (("counter", "gauge") if family == name else ("histogram",))
    for function, name in re.findall(r"(\w*)\((instep_\w+)", query):
        is_rated, grows = function in ("rate", "increase"), name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert is_rated == grows or "mismatches" in name, f"{function} of {name}"
    for label, value in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', query):
        assert label in LABELS
        assert label != "code" or value in Code.__members__
        assert label != "place" or value.upper() in Place.__members__
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert set(labels.split(", ")) <= LABELS | {"le"}


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    sections = PAGE.text.split("\n## Alerts\n")[1].split("\n## ")[0]
    anchors = [title.lower().replace(" ", "-") for title in re.findall(r"^### (.+)$", sections, re.M)]
    runbooks = [value for rule in RULES for name, value in rule["annotations"].items() if name.startswith("runbook")]
    assert [runbook.partition("#")[2] for runbook in runbooks] == anchors


def test_a_mismatch_is_alerted_for_as_long_as_the_server_runs() -> None:
    """Each is counted once, and `increase` misses what was counted before the first scrape."""
    alerted = next(rule["expr"] for rule in RULES if rule["alert"] == "InstepBitsDiffer")
    names = sorted(name for name in BY_NAME if name.endswith("mismatches_total"))
    assert sorted(alerted.split(" or ")) == [f"{name} > 0" for name in names]


def test_every_metric_that_tells_of_trouble_has_an_alert_or_a_panel() -> None:
    text = "\n".join(QUERIES + ALERTED)
    unseen = {name for name in BY_NAME if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)}
    principals = {f"instep_principal_{name}" for name in ("frames_total", "unread_bytes", "connections", "streams")}
    assert unseen == {"instep_build_info", "instep_uptime_seconds", "instep_recovery_seconds"} | principals
