"""Reads Grafana's dashboards as far as they are drawn, and fills them from Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.local.topology import REPOSITORY
from deploy.pictures.recording import Dashboard, Labels, Panel, Query, Series

FOLDER = REPOSITORY / "deploy" / "grafana" / "dashboards"
RATE_INTERVAL = "$__rate_interval"

Ask = Callable[[str], list[tuple[Labels, tuple[tuple[float, float], ...]]]]
"""Gives the series of a PromQL expression: labels and points."""

_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class UnknownPanel(Exception):
    """A dashboard has something that can't be drawn. The text names it."""


def read() -> list[Dashboard]:
    """All dashboards, without data. Raises UnknownPanel."""
    return [_dashboard(path) for path in sorted(FOLDER.glob("*.json"))]


def filled(dashboard: Dashboard, ask: Ask, rate_interval: str) -> Dashboard:
    """The dashboard with every query's answer. `rate_interval` is what Grafana would put there."""

    def answered(query: Query) -> Query:
        expression = query.expression.replace(RATE_INTERVAL, rate_interval)
        series = (
            Series(legend=legend_of(query.legend, labels), points=points)
            for labels, points in ask(expression)
        )
        return query.model_copy(
            update={"series": tuple(sorted(series, key=lambda each: each.legend))}
        )

    return dashboard.model_copy(
        update={
            "panels": tuple(
                panel.model_copy(
                    update={"queries": tuple(answered(query) for query in panel.queries)}
                )
                for panel in dashboard.panels
            )
        }
    )


def legend_of(template: str, labels: Labels) -> str:
    """What Grafana would write: `{{reason}}` is the label's value, empty if there is none."""
    return _LABEL.sub(lambda match: labels.get(match[1], ""), template)


def _dashboard(path: Path) -> Dashboard:
    content = json.loads(path.read_text())
    return Dashboard(
        name=path.stem,
        title=content["title"],
        description=content["description"],
        panels=tuple(_panel(path, panel) for panel in content["panels"]),
    )


def _panel(path: Path, panel: dict[str, Any]) -> Panel:
    if panel["type"] not in ("row", "text", "timeseries"):
        raise UnknownPanel(f"{path.name}: {panel['title']} is of type {panel['type']}")
    place = panel["gridPos"]
    return Panel(
        type=panel["type"],
        title=panel["title"],
        description=panel.get("description") or "",
        text=panel.get("options", {}).get("content") or "",
        unit=panel.get("fieldConfig", {}).get("defaults", {}).get("unit") or "short",
        x=place["x"],
        y=place["y"],
        width=place["w"],
        height=place["h"],
        queries=tuple(
            Query(expression=target["expr"], legend=target["legendFormat"])
            for target in panel.get("targets", ())
        ),
    )
