"""The comparison of the KV index with Dynamo's, as far as it needs no Dynamo."""

import dataclasses

import pytest

from benchmarks.kv_index import report
from benchmarks.kv_index.cases import Case
from benchmarks.kv_index.child import WrongAnswerError, measure
from benchmarks.kv_index.results import Comparison, Run
from benchmarks.kv_index.switchgear_side import SwitchgearSide
from benchmarks.serving.results import Machine

OWN = Case("own", 3, 8, 0)
RAGGED = Case("ragged", 5, 8, 20)


def comparison(ours: dict[str, float], theirs: dict[str, float]) -> Comparison:
    sides = {report.OURS: ours, report.THEIRS: theirs, report.IN_PYTHON: theirs}
    return Comparison(
        started_at="2026-01-01T00:00:00Z",
        commit="abc",
        machine=Machine(cpu="cpu", cores=2, memory_bytes=8 * 10**9, system="Linux"),
        versions={"Python": "3.11"},
        rounds=3,
        runs=[
            Run(side=side, round=number, case=OWN, figures=figures)
            for side, figures in sides.items()
            for number in (1, 2, 3)
        ],
    )


def test_what_is_kept_can_be_read_again() -> None:
    kept = comparison({"lookup_p50_seconds": 1e-6}, {"lookup_p50_seconds": 2e-6})
    assert Comparison.model_validate_json(kept.to_json()) == kept


def test_the_report_names_the_rows_in_which_dynamo_is_ahead() -> None:
    ours = {"lookup_p50_seconds": 1e-6, "stored_blocks_per_second": 1e6}
    theirs = {"lookup_p50_seconds": 2e-6, "stored_blocks_per_second": 4e6}
    page = report.markdown(comparison(ours, theirs), differences="what differs")
    assert "Dynamo is ahead in: stored (chains of their own, 3, 8)." in page
    assert "| 1.00 | 2.00 | **2.00** | 2.00 |" in page
    assert "| 1.00 | 4.00 | **0.25** | 4.00 |" in page


@pytest.mark.parametrize("case", [OWN, RAGGED, dataclasses.replace(RAGGED, kind="whole")])
def test_each_kind_of_case_gives_figures_of_our_side(case: Case) -> None:
    figures = measure(case, SwitchgearSide, seed=1)
    assert figures
    assert all(value > 0 for value in figures.values())


def test_a_side_that_answers_wrongly_is_not_measured() -> None:
    class Forgetful(SwitchgearSide):
        def apply(self, worker: int, event: bytes) -> None:
            pass

    with pytest.raises(WrongAnswerError):
        measure(OWN, Forgetful, seed=1)
