"""What counts as a leak."""

from __future__ import annotations

import math
from random import Random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.soak import verdict
from benchmarks.soak.results import Outcome
from tests.benchmarks.soak import samples

NUMBERS = st.integers(-1_000, 1_000)


def test_a_quiet_soak_leaks_nothing() -> None:
    assert verdict.leaks(samples.soak()) == []


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({"tasks": 11}, "router-0 has 11 tasks, 10 before"),
        ({"calls": 3}, "router-0 has 3 gRPC calls, 2 before"),
        ({"open_files": 21}, "router-0 has 21 open files, 20 before"),
        ({"state": {"running": 1.0}}, "router-0 has running 1"),
    ],
)
def test_whatever_is_left_at_the_end_is_named(different: dict[str, object], words: str) -> None:
    assert verdict.leaks(samples.soak(end=samples.sample(1_100, **different))) == [words]


def test_having_less_than_before_is_no_leak() -> None:
    end = samples.sample(1_100, tasks=9, open_files=19, calls=1)
    assert verdict.leaks(samples.soak(end=end)) == []


def test_a_request_that_ended_otherwise_is_named() -> None:
    outcomes = [Outcome(kind="chat", wanted="200", counts={"200": 9, "500": 1})]
    assert verdict.leaks(samples.soak(outcomes=outcomes)) == ["chat: 1 times '500' and not '200'"]


@pytest.mark.parametrize(("bytes_per_request", "is_leak"), [(31, False), (33, True)])
def test_steady_growth_is_a_leak_above_the_bound(bytes_per_request: int, is_leak: bool) -> None:
    random = Random(0)
    grown = [
        samples.sample(
            number, resident_bytes=10**8 + bytes_per_request * number + random.randrange(500)
        )
        for number in range(0, 100_000, 500)
    ]
    assert bool(verdict.leaks(samples.soak(samples=grown))) is is_leak


def test_growth_before_the_middle_is_warming_up() -> None:
    grown = [
        samples.sample(number, resident_bytes=10**8 + 1_000 * min(number, 490))
        for number in range(0, 1_000, 10)
    ]
    assert verdict.leaks(samples.soak(samples=grown)) == []


def test_one_jump_is_no_slope() -> None:
    ys = [0.0] * 30 + [1e6] * 5
    assert verdict.slope(range(35), ys) == 0


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_the_slope_is_the_median_over_all_pairs(points: list[tuple[int, int]]) -> None:
    slopes = [
        (y2 - y1) / (x2 - x1)
        for i, (x1, y1) in enumerate(points)
        for x2, y2 in points[i + 1 :]
        if x1 != x2
    ]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert math.isclose(
        verdict.slope(xs, ys), median(slopes) if slopes else 0.0, rel_tol=1e-9, abs_tol=1e-9
    )
