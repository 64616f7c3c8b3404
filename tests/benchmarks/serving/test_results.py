"""What follows from what was measured."""

import pytest

from benchmarks.serving.results import Run
from tests.benchmarks.serving import samples


def test_rates_are_over_the_window() -> None:
    run = samples.run()
    assert run.requests_per_second == 10
    assert run.tokens_per_second == 640


def test_cpu_time_is_for_a_thousand_tokens_of_the_roles_asked_for() -> None:
    run = samples.run()
    assert run.cpu_seconds_per_1000_tokens() == pytest.approx(1.0)
    assert run.cpu_seconds_per_1000_tokens("router") == pytest.approx(0.5)
    assert run.cpu_seconds_per_1000_tokens("nats") == 0


def test_tokens_of_probes_are_work_but_not_throughput() -> None:
    run = samples.run(answers=50, probe_answers=50)
    assert run.cpu_seconds_per_1000_tokens() == pytest.approx(1.0)
    assert run.tokens_per_second == 320


def test_a_run_without_answers_divides_by_nothing_that_is_nothing() -> None:
    run = samples.run(answers=0)
    assert run.tokens_per_second == 0
    assert run.cpu_seconds_per_1000_tokens() > 0


def test_results_survive_being_kept() -> None:
    run = samples.run()
    assert Run.model_validate_json(run.model_dump_json()) == run
