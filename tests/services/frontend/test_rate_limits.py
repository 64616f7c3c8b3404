"""Token buckets against the closed form of what they promise."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.core.rate_limits import Bucket, Limits, Usage

# Multiples of 60 a minute and of an eighth of a second are exact in floating point.
RATES = st.integers(1, 20).map(lambda per_second: 60 * per_second)
GAPS = st.integers(0, 8 * 90).map(lambda eighths: eighths / 8)
AMOUNTS = st.integers(1, 3000)


@dataclass
class Log:
    """What a bucket of that rate has left, from everything that was taken: it was full at some
    moment at the latest, and from then on gained at its rate and lost what was taken."""

    per_minute: int
    taken: list[tuple[float, int]] = field(default_factory=list)

    def level_at(self, now: float) -> float:
        levels = [float(self.per_minute)]
        for since in {when for when, _ in self.taken}:
            # Full just before `since`, and nothing but this after it.
            lost = sum(amount for when, amount in self.taken if when >= since)
            levels.append(self.per_minute + (now - since) * self.per_minute / 60 - lost)
        return min(levels)


@given(RATES, st.lists(st.tuples(GAPS, AMOUNTS), max_size=30))
def test_a_bucket_agrees_with_a_log_of_all_that_was_taken(
    per_minute: int, wishes: list[tuple[float, int]]
) -> None:
    bucket, log = Bucket(per_minute, per_minute, 0.0), Log(per_minute)
    now = 0.0
    for gap, amount in wishes:
        now += gap
        assert bucket.level_at(now) == log.level_at(now)
        seconds = bucket.seconds_until(amount, now)
        assert (seconds == 0) == (log.level_at(now) >= min(amount, per_minute))
        if seconds:
            assert log.level_at(now + seconds) == pytest.approx(min(amount, per_minute))
            continue
        bucket.take(amount, now)
        log.taken.append((now, amount))


@given(RATES, st.lists(st.tuples(GAPS, st.integers(1, 60)), max_size=40))
def test_no_window_of_time_lets_more_in_than_a_minutes_worth_and_the_rate(
    per_minute: int, wishes: list[tuple[float, int]]
) -> None:
    usage = Usage(Limits(tokens_per_minute=per_minute), 0.0)
    let_in: list[tuple[float, int]] = []
    now = 0.0
    for gap, amount in wishes:
        now += gap
        if usage.reserve(amount, now) is None:
            let_in.append((now, amount))
    for begin, _ in let_in:
        for end, _ in let_in:
            inside = sum(amount for when, amount in let_in if begin <= when <= end)
            assert inside <= max(0.0, per_minute + (end - begin) * per_minute / 60) or end < begin


def test_a_request_larger_than_the_bucket_gets_in_when_it_is_full_and_leaves_a_debt() -> None:
    usage = Usage(Limits(tokens_per_minute=60), 0.0)
    assert usage.reserve(150, 0.0) is None
    refusal = usage.reserve(1, 0.0)
    assert refusal is not None
    assert refusal.retry_after_seconds == 91
    assert usage.reserve(1, 91.0) is None


def test_what_was_not_used_is_given_back_and_more_use_is_debt() -> None:
    usage = Usage(Limits(tokens_per_minute=600), 0.0)
    assert usage.reserve(500, 0.0) is None
    usage.settle(500, 100, 0.0)
    left = usage.remaining_tokens(0.0)
    assert left is not None
    assert (left.limit, left.remaining, left.reset_seconds) == (600, 500, 10)
    assert usage.reserve(100, 0.0) is None
    usage.settle(100, 700, 0.0)
    # Whoever is in debt is refused before its prompt is looked at.
    refusal = usage.admit(0.0)
    assert refusal is not None
    assert refusal.limited == "tokens"
    assert refusal.retry_after_seconds == pytest.approx(20.1)


def test_places_come_back_and_a_refused_request_takes_none() -> None:
    usage = Usage(Limits(concurrent_requests=2, requests_per_minute=3), 0.0)
    assert usage.admit(0.0) is None
    assert usage.admit(0.0) is None
    refusal = usage.admit(0.0)
    assert refusal is not None
    assert (refusal.limited, refusal.limit) == ("concurrent requests", 2)
    usage.leave()
    assert usage.admit(0.0) is None
    usage.leave()
    refusal = usage.admit(0.0)
    assert refusal is not None
    assert (refusal.limited, refusal.retry_after_seconds) == ("requests", 20)
    assert usage.admit(20.0) is None
    assert usage.running == 2


def test_other_limits_keep_what_was_used() -> None:
    usage = Usage(Limits(requests_per_minute=60), 0.0)
    for _ in range(40):
        assert usage.admit(0.0) is None
    usage.set_limits(Limits(requests_per_minute=120, tokens_per_minute=60), 0.0)
    left = usage.remaining_requests(0.0)
    assert left is not None
    assert left.remaining == 80
    usage.set_limits(Limits(requests_per_minute=30), 0.0)
    assert usage.admit(0.0) is not None
    usage.set_limits(Limits(), 0.0)
    assert usage.admit(0.0) is None
    assert usage.remaining_requests(0.0) is None


def test_without_limits_nothing_is_refused() -> None:
    usage = Usage(Limits(), 0.0)
    assert [usage.admit(0.0) for _ in range(1000)] == [None] * 1000
    assert usage.reserve(10**9, 0.0) is None
    assert usage.remaining_tokens(0.0) is None
