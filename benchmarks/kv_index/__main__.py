"""The KV index beside NVIDIA Dynamo's radix tree: `python -m benchmarks.kv_index --help`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.kv_index import cases, report
from benchmarks.kv_index.cases import Case
from benchmarks.kv_index.results import Comparison, Run
from benchmarks.serving import environment
from benchmarks.serving.systems import DYNAMO_PYTHON
from deploy.local.topology import REPOSITORY
from services.kv_indexer.core.index import CompiledIndex

_RESULTS = REPOSITORY / "benchmarks" / "results"
_DIFFERENCES = Path(__file__).with_name("differences.md")
_PYTHONS = {
    report.OURS: Path(sys.executable),
    report.IN_PYTHON: Path(sys.executable),
    report.THEIRS: DYNAMO_PYTHON,
}
_STOP_SECONDS = 10.0

Measure = Callable[[Case, int], dict[str, float]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class ChildError(Exception):
    """A measuring process ended before it answered."""


class NotCompiledError(Exception):
    """There is no compiled index to measure."""


@app.command()
def run(
    quick: Annotated[bool, typer.Option(help="Few cases, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each case and side.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder for results.")] = _RESULTS,
) -> None:
    """Measure, keep the results as JSON, and write the report beside them."""
    if CompiledIndex is None:
        raise NotCompiledError("the index is not compiled: `make env` does it, with a C++ compiler")
    chosen = cases.QUICK if quick else cases.FULL
    rounds = 1 if quick else rounds
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit = environment.commit()
    comparison = Comparison(
        started_at=started_at,
        commit=commit,
        machine=environment.machine(),
        versions={
            "Python": platform.python_version(),
            "protobuf": metadata.version("protobuf"),
            "ai-dynamo": environment.dynamo_version(),
        },
        rounds=rounds,
        runs=list(_measure(chosen, rounds)),
    )
    results.mkdir(parents=True, exist_ok=True)
    name = f"kv_index-{'quick-' if quick else ''}{started_at.replace(':', '')}"
    page = report.markdown(comparison, differences=_DIFFERENCES.read_text())
    (results / f"{name}.json").write_text(comparison.to_json())
    (results / f"{name}.md").write_text(page)
    print(page)
    print(f"kept: {results / name}.json and .md")


def _measure(chosen: tuple[Case, ...], rounds: int) -> Iterator[Run]:
    with ExitStack() as running:
        lasting = {side: running.enter_context(_measuring(side)) for side in _PYTHONS}
        for case in chosen:
            for number in range(1, rounds + 1):
                # Who goes first changes.
                for side in sorted(_PYTHONS, reverse=number % 2 == 1):
                    if case.kind == "memory":
                        # In a process that has used none yet.
                        with _measuring(side) as measure:
                            figures = measure(case, number)
                    else:
                        figures = lasting[side](case, number)
                    yield Run(side=side, round=number, case=case, figures=figures)
                    print(f"{case.name:<24} {side:<20} {_line(figures)}", file=sys.stderr)


@contextmanager
def _measuring(side: str) -> Iterator[Measure]:
    """A process that measures one side while the body runs."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "build" / "proto")])
    with subprocess.Popen(
        [str(_PYTHONS[side]), "-m", "benchmarks.kv_index.child", side],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        tasks, answers = child.stdin, child.stdout

        def measure(case: Case, seed: int) -> dict[str, float]:
            tasks.write(json.dumps({"case": dataclasses.asdict(case), "seed": seed}) + "\n")
            tasks.flush()
            answer = answers.readline()
            if not answer:
                raise ChildError(f"{side} ended in {case.name}")
            figures: dict[str, float] = json.loads(answer)
            return figures

        try:
            yield measure
        finally:
            tasks.close()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def _line(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in figures.items())


def main() -> None:
    try:
        app()
    except (ChildError, NotCompiledError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
