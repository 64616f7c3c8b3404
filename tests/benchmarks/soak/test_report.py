"""The page that people read."""

from __future__ import annotations

from benchmarks.soak import report
from tests.benchmarks.soak import samples


def test_a_page_without_leaks_says_so() -> None:
    page = report.markdown(samples.soak())
    assert "**Nothing leaks**" in page
    assert "| router-0 | 100.0 | 100.0 | 100.0 | +0.0 | 20 → 20 |" in page
    assert "| chat | 1,100 | 200: 1,100 |" in page


def test_leaks_are_listed() -> None:
    page = report.markdown(samples.soak(end=samples.sample(1_100, tasks=12)))
    assert "- router-0 has 12 tasks, 10 before" in page
    assert "Nothing leaks" not in page
