"""Dashboards and alerts ask for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local.topology import REPOSITORY
from tests.fixtures.metrics_table import documented_metrics

DASHBOARDS = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
NOT_OURS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "up"}
"""Metrics of the Python client, and Prometheus's own."""
SCRAPED = {"component", "instance", "job"}
"""Labels that Prometheus adds, the first by deploy/prometheus."""

_STRING = re.compile(r'"[^"]*"')
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
_MATCHERS = re.compile(r"\{([^}]*)\}")
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_WORDS = {"histogram_quantile", "sum", "rate", "increase", "max", "min", "vector", "or"}
"""Of PromQL."""
_SERIES = re.compile("_(?:bucket|count)$")
"""How the series of a histogram are told from its name."""


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]


def metrics_of(expression: str) -> set[str]:
    """The metrics in a PromQL expression, histograms by the names that they are documented by."""
    bare = _MATCHERS.sub("", _GROUPING.sub("", _RANGE.sub("", _STRING.sub("", expression))))
    words = set(_WORD.findall(bare)) - _WORDS
    return {_SERIES.sub("", word) for word in words}


def labels_of(expression: str) -> set[str]:
    matched = [label.split("=")[0] for label in _MATCHERS.findall(expression)]
    grouped = [label for group in _GROUPING.findall(expression) for label in group.split(",")]
    return {label.strip().rstrip("!") for label in matched + grouped} - {"le"}


def test_the_parser_finds_metrics_and_labels() -> None:
    expression = (
        'sum by (le, leg) (rate(a_b_bucket{source="x y"}[$__rate_interval])) / max(c_total)'
    )
    assert metrics_of(expression) == {"a_b", "c_total"}
    assert labels_of(expression) == {"leg", "source"}


def checked(expression: str) -> set[str]:
    """The labels of a PromQL expression's metrics, which are there and asked for as their types
    want."""
    documented = documented_metrics()
    metrics = metrics_of(expression)
    assert metrics
    assert metrics <= documented.keys() | NOT_OURS, expression
    ours = [documented[name] for name in metrics & documented.keys()]
    labels = SCRAPED.union(*(metric.labels for metric in ours))
    assert labels_of(expression) <= labels, expression
    if "histogram_quantile" in expression:
        assert [metric.type for metric in ours] == ["histogram"]
    if any(metric.type == "counter" for metric in ours):
        assert "rate(" in expression or "increase(" in expression
    return labels


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_is_of_metrics_and_labels_that_exist(path: Path) -> None:
    for panel in panels(json.loads(path.read_text())):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            labels = checked(target["expr"])
            # A series that the legend can't tell from another.
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def test_prometheus_loads_the_alerts() -> None:
    config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
    assert config["rule_files"] == [ALERTS.name]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_every_alert_is_of_metrics_and_labels_that_exist_and_has_its_place_in_the_runbook(
    rule: dict[str, Any],
) -> None:
    labels = checked(rule["expr"])
    told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    # What was summed over is no longer told apart.
    grouped = _GROUPING.findall(rule["expr"])
    kept = {label.strip() for group in grouped for label in group.split(",")}
    assert told <= (kept if "sum" in rule["expr"] or "max" in rule["expr"] else labels)
    page, anchor = rule["annotations"]["runbook"].split("#")
    headings = re.findall(r"^##+ (.+)$", (REPOSITORY / page).read_text(), flags=re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_the_runbook_names_metrics_that_exist() -> None:
    text = (REPOSITORY / "docs" / "runbook.md").read_text()
    named = {_SERIES.sub("", name) for name in re.findall(r"switchgear_[a-z_]+", text)}
    assert named - {"switchgear_"} <= documented_metrics().keys()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_loaded_beside_the_others(path: Path) -> None:
    boards = [json.loads(each.read_text()) for each in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards)
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]


def test_every_metric_is_on_some_dashboard() -> None:
    shown = {
        metric
        for path in DASHBOARDS
        for panel in panels(json.loads(path.read_text()))
        for target in panel["targets"]
        for metric in metrics_of(target["expr"])
    }
    assert documented_metrics().keys() <= shown
