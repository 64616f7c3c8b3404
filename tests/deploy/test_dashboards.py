"""Dashboards ask for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.local.topology import REPOSITORY
from tests.fixtures.metrics_table import documented_metrics

DASHBOARDS = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
CLIENTS_OWN = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
SCRAPED = {"component", "instance"}
"""Labels that Prometheus adds, the former by deploy/prometheus."""

_STRING = re.compile(r'"[^"]*"')
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
_MATCHERS = re.compile(r"\{([^}]*)\}")
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_FUNCTIONS = {"histogram_quantile", "sum", "rate", "increase", "max", "min"}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]


def metrics_of(expression: str) -> set[str]:
    """The metrics in a PromQL expression, histograms by the names that they are documented by."""
    bare = _MATCHERS.sub("", _GROUPING.sub("", _RANGE.sub("", _STRING.sub("", expression))))
    words = set(_WORD.findall(bare)) - _FUNCTIONS
    return {word.removesuffix("_bucket") for word in words}


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


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_is_of_metrics_and_labels_that_exist(path: Path) -> None:
    documented = documented_metrics()
    for panel in panels(json.loads(path.read_text())):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            metrics = metrics_of(target["expr"])
            assert metrics
            assert metrics <= documented.keys() | CLIENTS_OWN, panel["title"]
            labels = {
                label for name in metrics & documented.keys() for label in documented[name].labels
            }
            assert labels_of(target["expr"]) <= labels | SCRAPED, panel["title"]
            # A series that the legend can't tell from another.
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels | SCRAPED
            if "histogram_quantile" in target["expr"]:
                [name] = metrics
                assert documented[name].type == "histogram"
            if any(documented[name].type == "counter" for name in metrics & documented.keys()):
                assert "rate(" in target["expr"] or "increase(" in target["expr"]


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
