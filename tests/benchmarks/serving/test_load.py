"""What wrk's script prints, understood."""

import pytest

from benchmarks.serving.load import LoadError, parse_outcome

OUTCOME = (
    '{"answers_by_tenth":{"100":7,"101":2,"109":5,"110":9},"requests":320,"status_errors":1,'
    '"socket_errors":0,'
    '"timeouts":0,"latency_p50_us":393233,"latency_p99_us":415076}'
)


def test_the_outcome_is_the_line_after_what_wrk_itself_prints() -> None:
    outcome = parse_outcome(f"Running 4s test @ http://127.0.0.1:1\n  1 threads\n{OUTCOME}\n")
    assert (outcome.requests, outcome.status_errors) == (320, 1)


def test_answers_are_counted_from_the_first_tenth_until_before_the_last() -> None:
    assert parse_outcome(OUTCOME).answers_between(101, 110) == 7


def test_without_an_outcome_the_error_says_what_wrk_said() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        parse_outcome("unable to connect to 127.0.0.1:1 Connection refused\n")
