"""The metrics in the documentation, in the alerts and on the dashboard are those that the server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.config import Config
from instep.frontends.http.metrics import METRICS
from instep_client.protocol.codes import Code, Place
from tests.docs.support.page import Page

DEPLOY = Path(__file__).parents[2] / "deploy"
PAGE = Page("operations.md")
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "instep.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
SCRAPES = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
BY_NAME = {metric.name: metric for metric in METRICS}
LABELS = {"instance", "job", *(label for metric in METRICS for label in metric.labels)}
ANCHORS = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in PAGE.sections}


def panels(of: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All panels, those in rows that are closed too."""
    for panel in of:
        yield panel
        yield from panels(panel.get("panels", []))


PANELS = [panel for panel in panels(DASHBOARD["panels"]) if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
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
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_what_has_happened_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Instep[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.search(r"\$labels\.(model|instance)", rule["annotations"]["summary"])
    page, _, section = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    assert section in ANCHORS


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    sections = PAGE.text.split("\n## Alerts\n")[1].split("\n## ")[0]
    titles = re.findall(r"^### (.+)$", sections, re.M)
    anchors = [title.lower().replace(" ", "-") for title in titles]
    assert [rule["annotations"]["runbook"].partition("#")[2] for rule in RULES] == anchors


def test_a_mismatch_is_alerted_for_as_long_as_the_server_runs() -> None:
    """Each is counted once, and `increase` misses what was counted before the first scrape."""
    alerted = next(rule["expr"] for rule in RULES if rule["alert"] == "InstepBitsDiffer")
    names = sorted(name for name in BY_NAME if name.endswith("mismatches_total"))
    assert sorted(alerted.split(" or ")) == [f"{name} > 0" for name in names]


def test_every_metric_that_tells_of_trouble_has_an_alert_or_a_panel() -> None:
    text = "\n".join(QUERIES + ALERTED)
    unseen = {name for name in BY_NAME if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)}
    told_by_others = ("build_info", "uptime_seconds", "recovery_seconds")
    assert unseen == {f"instep_{name}" for name in told_by_others}


def test_panels_lie_next_to_each_other_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(DASHBOARD["panels"]):
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels(DASHBOARD["panels"])}) == len(list(panels(DASHBOARD["panels"])))
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance", "model"}


def test_prometheus_and_grafana_of_the_composition_find_their_files_and_each_other() -> None:
    (scrape,) = SCRAPES["scrape_configs"]
    assert scrape["job_name"] == "instep"
    assert all((DEPLOY / "prometheus" / name).is_file() for name in SCRAPES["rule_files"])
    services = COMPOSE["services"]
    prometheus, grafana = services["prometheus"], services["grafana"]
    assert all("profiles" in service for name, service in services.items() if name != "server")
    assert prometheus["network_mode"] == "service:server"
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert sources["datasources"][0]["url"] == "http://server:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/instep.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for service in (prometheus, grafana) for volume in service["volumes"])
    for place in mounts:
        assert place in COMPOSE["volumes"] or (DEPLOY / place).exists(), place
    assert mounts["./grafana/instep.json"] == f"{provider['options']['path']}/{DASHBOARD['uid']}.json"
    (config,) = [word for word in prometheus["command"] if word.startswith("--config.file=")]
    assert config == f"--config.file={mounts['./prometheus']}/prometheus.yaml"
    assert all(":" in service["image"] for service in (prometheus, grafana)), "a version"
    assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])
    assert scrape["static_configs"][0]["targets"] == [Config().http.endpoint]
