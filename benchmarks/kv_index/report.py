"""The table, from the kept results. Pure."""

from benchmarks.kv_index.cases import Case
from benchmarks.kv_index.results import Comparison
from benchmarks.serving.report import table

OURS, THEIRS, IN_PYTHON = "switchgear", "dynamo", "switchgear in Python"

_CASES = {
    "own": "chains of their own",
    "whole": "all have the same chain",
    "ragged": "each has another depth of it",
    "memory": "all have the same blocks",
}
# Name, unit, what a figure is multiplied by, and whether more is better.
_FIGURES = {
    "stored_blocks_per_second": ("stored", "M blocks/s", 1e-6, True),
    "removed_blocks_per_second": ("removed by events", "M blocks/s", 1e-6, True),
    "left_blocks_per_second": ("gone with their workers", "M blocks/s", 1e-6, True),
    "lookup_p50_seconds": ("lookup p50", "µs", 1e6, False),
    "lookup_p99_seconds": ("lookup p99", "µs", 1e6, False),
    "unknown_lookup_p50_seconds": ("lookup of an unknown prompt p50", "µs", 1e6, False),
    "unknown_lookup_p99_seconds": ("lookup of an unknown prompt p99", "µs", 1e6, False),
    "bytes_per_million_blocks": ("memory for a million blocks", "MB", 1e-6, False),
}


def markdown(comparison: Comparison, *, differences: str) -> str:
    """The whole report; `differences` goes last, as it is."""
    rows, lost = [], []
    cases = list(dict.fromkeys(run.case for run in comparison.runs))
    for figure, (name, unit, scale, is_more_better) in _FIGURES.items():
        for case in cases:
            if not _has(comparison, case, figure):
                continue
            ours = comparison.median(OURS, case, figure)
            theirs = comparison.median(THEIRS, case, figure)
            times = ours / theirs if is_more_better else theirs / ours
            about = [_CASES[case.kind], f"{case.workers:,}", f"{case.blocks:,}"]
            in_python = comparison.median(IN_PYTHON, case, figure)
            values = [f"{value * scale:,.2f}" for value in (ours, theirs, in_python)]
            values.insert(2, f"**{times:.2f}**")
            rows.append([f"{name}, {unit}", *about, *values])
            if times < 1:
                lost.append(f"{name} ({', '.join(about)})")
    machine = comparison.machine
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    verdict = f"Dynamo is ahead in: {'; '.join(lost)}." if lost else "Dynamo is ahead in no row."
    header = ["", " ", "workers", "blocks of a chain", OURS, THEIRS, "times better", IN_PYTHON]
    return f"""\
# The KV index beside NVIDIA Dynamo's radix tree

{comparison.started_at}, commit {comparison.commit}. {machine.cpu}, {machine.cores} cores, \
{machine.memory_bytes / 1e9:.0f} GB, {machine.system}. {versions}.
Medians of {comparison.rounds} alternating rounds. {verdict}

{table(header, rows)}
{differences}"""


def _has(comparison: Comparison, case: Case, figure: str) -> bool:
    return any(run.case == case and figure in run.figures for run in comparison.runs)
