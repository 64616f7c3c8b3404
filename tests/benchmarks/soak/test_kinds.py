"""What is sent."""

from __future__ import annotations

from benchmarks.soak.kinds import KINDS
from benchmarks.soak.watch import parse_metrics


def test_weights_are_percentages() -> None:
    assert sum(kind.weight for kind in KINDS) == 100


def test_samples_of_one_metric_are_added_up() -> None:
    text = '# HELP calls Calls.\ncalls{method="/a b"} 2.0\ncalls{method="c"} 3.0\ntasks 1e+01\n'
    assert parse_metrics(text) == {"calls": 5.0, "tasks": 10.0}
