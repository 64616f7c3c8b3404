"""What pictures are drawn from: dashboards, Prometheus' configuration, traces, numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.topology import Deployment, processes
from deploy.pictures import dashboards, look, prometheus
from deploy.pictures.recording import Dashboard, Labels, Panel, Query, Trace, TraceSpan

CONFIGURATION = prometheus.CONFIGURATION.read_text()
BOARDS = dashboards.read()
UNITS = sorted({panel.unit for board in BOARDS for panel in board.panels})


def board(*queries: Query) -> Dashboard:
    panel = Panel(
        type="timeseries",
        title="Errors",
        description="",
        text="",
        unit="s",
        x=0,
        y=0,
        width=8,
        height=8,
        queries=queries,
    )
    return Dashboard(name="b", title="Board", description="", panels=(panel,))


def test_every_dashboard_can_be_drawn_and_no_panel_lies_on_another() -> None:
    assert {each.name for each in BOARDS} == {"cluster", "request_life", "routing_and_kv"}
    for each in BOARDS:
        cells = [
            (column, row)
            for panel in each.panels
            for column in range(panel.x, panel.x + panel.width)
            for row in range(panel.y, panel.y + panel.height)
        ]
        assert len(set(cells)) == len(cells), each.name
        assert max(column for column, _ in cells) < 24, each.name


def test_a_dashboard_is_filled_with_what_its_queries_bring() -> None:
    asked = []

    def ask(expression: str) -> list[tuple[Labels, prometheus.Points]]:
        asked.append(expression)
        return [({"reason": "LOST"}, ((1.0, 2.0),)), ({"reason": "LATE"}, ((1.0, 3.0),))]

    query = Query(expression="rate(e[$__rate_interval])", legend="why: {{ reason }}{{other}}")
    [panel] = dashboards.filled(board(query), ask, rate_interval="20s").panels
    assert asked == ["rate(e[20s])"]
    assert [(series.legend, series.points) for series in panel.series] == [
        ("why: LATE", ((1.0, 3.0),)),
        ("why: LOST", ((1.0, 2.0),)),
    ]


def test_a_query_without_a_single_value_is_named() -> None:
    def ask(expression: str) -> list[tuple[Labels, prometheus.Points]]:
        answers: dict[str, list[tuple[Labels, prometheus.Points]]] = {
            "some": [({}, ((1.0, 0.0),))],
            "none": [],
            "nan": [({}, ())],
        }
        return answers[expression]

    queries = (Query(expression=each, legend=each) for each in ("some", "none", "nan"))
    filled = dashboards.filled(board(*queries), ask, rate_interval="20s")
    assert filled.without_data() == ["Board: Errors: none", "Board: Errors: nan"]


def test_a_local_prometheus_gives_components_the_names_that_compose_has(tmp_path: Path) -> None:
    deployment = Deployment(
        engine="sim", model=tmp_path, model_name="m", http_port=8000, prefill=1, decode=2
    )
    ports = iter(range(20_000, 21_000))
    specs = processes(deployment, tmp_path, lambda: next(ports))
    local = prometheus.local_configuration(CONFIGURATION, specs)
    [job] = local["scrape_configs"]
    assert local["global"] == yaml.safe_load(CONFIGURATION)["global"]
    [rule] = job["relabel_configs"]
    assert rule["target_label"] == "component"
    found = {}
    for target in job["static_configs"]:
        name = target["labels"][rule["source_labels"][0]]
        matched = re.fullmatch(rule["regex"], name)
        assert matched is not None
        found[target["labels"]["instance"]] = matched[1]
    assert found == {
        "frontend-0": "frontend",
        "router-0": "router",
        "kv_indexer-0": "kv-indexer",
        "prefill_worker-0": "prefill-worker",
        "decode_worker-0": "decode-worker",
        "decode_worker-1": "decode-worker",
    }


@given(st.floats(min_value=1e-9, max_value=1e14), st.sampled_from(UNITS))
def test_ticks_reach_the_highest_value_and_are_few_and_told_apart(value: float, unit: str) -> None:
    ticks = look.ticks(value, unit)
    assert ticks[0] == 0
    assert ticks[-1] >= value * (1 - 1e-6)
    assert 2 <= len(ticks) <= 5
    if value >= 1e-5:
        assert len({look.with_unit(tick, unit) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0025, "s", "2.5 ms"),
        (0.00025, "s", "250 µs"),
        (0, "s", "0 s"),
        (12.5, "reqps", "12.5 req/s"),
        (0.25, "percentunit", "25 %"),
        (3 * 2**20, "bytes", "3 MiB"),
        (2_500_000, "Bps", "2.5 MB/s"),
        (1500, "short", "1.5 k"),
        (7, "short", "7"),
    ],
)
def test_numbers_are_written_as_grafana_writes_their_unit(
    value: float, unit: str, text: str
) -> None:
    assert look.with_unit(value, unit) == text


def span(name: str, parent_id: str, began_at_ns: int) -> TraceSpan:
    return TraceSpan(
        service="router",
        instance="router-0",
        span_id=name,
        parent_id=parent_id,
        name=name,
        began_at_ns=began_at_ns,
        ended_at_ns=began_at_ns + 1,
        attributes={},
        is_error=False,
    )


def test_spans_stand_below_their_parents_in_order_of_beginning() -> None:
    spans = (
        span("second", "root", 5),
        span("inner", "first", 3),
        span("first", "root", 2),
        span("root", "the caller's", 1),
    )
    trace = Trace(deployment="", trace_id="", spans=spans)
    assert [(depth, each.name) for depth, each in trace.in_tree()] == [
        (0, "root"),
        (1, "first"),
        (2, "inner"),
        (1, "second"),
    ]
