"""The tables that people read."""

import math

from benchmarks.serving import report
from tests.benchmarks.serving import samples


def page(**theirs: object) -> str:
    benchmark = samples.benchmark(samples.run(), samples.run(system="dynamo", **theirs))
    return report.markdown(benchmark, picture_name="p.png", differences="THE DIFFERENCES")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_ratio_is_ours_to_theirs() -> None:
    [ratios] = [row for row in rows(page(answers=50)) if row[1] == "switchgear / dynamo"]
    assert ratios[2] == "**2.00**"


def test_each_other_system_has_a_ratio() -> None:
    runs = [samples.run(), samples.run(system="a", answers=50), samples.run(system="b")]
    text = report.markdown(samples.benchmark(*runs), picture_name="p.png", differences="")
    ratios = {row[1]: row[2] for row in rows(text) if row[1].startswith("switchgear / ")}
    assert ratios == {"switchgear / a": "**2.00**", "switchgear / b": "**1.00**"}


def test_a_median_is_taken_over_the_runs() -> None:
    runs = [samples.run(answers=count) for count in (10, 1_000, 30)]
    assert report.median(runs, lambda run: run.answers) == 30


def test_answers_in_one_piece_have_no_ttft() -> None:
    run = samples.run(is_streamed=False, probes=[])
    assert math.isnan(report.ttft_seconds(run, 50))


def test_percentiles_are_values_that_occurred() -> None:
    run = samples.run(probes=[samples.probe(number / 100) for number in range(1, 101)])
    assert report.ttft_seconds(run, 50) == 0.50
    assert report.ttft_seconds(run, 99) == 0.99
    assert report.ttft_seconds(samples.run(), 99) == 0.005


def test_steps_allow_each_client_one_token_a_step() -> None:
    [scenario] = samples.benchmark().scenarios
    assert report.possible_tokens_per_second(scenario, 5.0) == 200


def test_failures_are_listed_by_run() -> None:
    assert "None, in any run" in page()
    listed = page(refused_answers=3, timeouts=1)
    assert "None, in any run" not in listed
    assert ["chat, 1 client", "dynamo", "1", "3", "0", "1", "0"] in rows(listed)


def test_cpu_time_is_shown_for_each_role() -> None:
    assert ["", "frontend", "router"] in [row[:3] for row in rows(page())]


def test_the_page_shows_the_picture_and_ends_with_the_differences() -> None:
    assert "](p.png)" in page()
    assert page().endswith("THE DIFFERENCES")


def test_all_rows_of_a_table_have_its_width() -> None:
    widths: set[int] = set()
    for line in [*page().splitlines(), ""]:
        if line.startswith("|"):
            widths.add(line.count("|"))
        else:
            assert len(widths) <= 1
            widths.clear()
