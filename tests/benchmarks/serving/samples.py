"""Results that nobody measured."""

from typing import Any

from benchmarks.serving.results import (
    Benchmark,
    Ceiling,
    Check,
    Machine,
    ProbeRecord,
    Run,
    ScenarioRecord,
)


def run(**different: Any) -> Run:
    """100 answers of 64 tokens in 10 s."""
    facts: dict[str, Any] = {
        "scenario": "chat, 1 client",
        "system": "switchgear",
        "round": 1,
        "window_seconds": 10.0,
        "answers": 100,
        "refused_answers": 0,
        "socket_errors": 0,
        "timeouts": 0,
        "failed_probes": 0,
        "latency_p50_seconds": 0.4,
        "latency_p99_seconds": 0.5,
        "output_tokens": 64,
        "is_streamed": True,
        "probes": [probe(0.005)],
        "probe_answers": 0,
        "cpu_seconds": {"frontend": 3.2, "router": 3.2},
        "resident_bytes": {"frontend": 100_000_000, "router": 50_000_000},
        "load_generator_cpu_cores": 0.05,
        "other_cpu_seconds": 0.1,
    }
    return Run.model_validate(facts | different)


def probe(ttft_seconds: float) -> ProbeRecord:
    """Of an answer with each token in an event of its own."""
    return ProbeRecord(ttft_seconds=ttft_seconds, total_seconds=0.4, text_events=64)


def benchmark(*runs: Run) -> Benchmark:
    return Benchmark(
        started_at="2030-01-01T00:00:00Z",
        commit="abcdef0",
        machine=Machine(cpu="some processor", cores=2, memory_bytes=8 * 10**9, system="Linux 6"),
        versions={"wrk": "4.1.0"},
        step_ms=6.0,
        rounds=1,
        seconds_per_run=10,
        scenarios=[
            ScenarioRecord(
                name="chat, 1 client",
                clients=1,
                output_tokens=64,
                is_streamed=True,
                prompt_bytes=0,
                run_length=1,
            )
        ],
        checks={"switchgear": {"s": Check(prompt_tokens=70, output_tokens=64, step_ms=6.01)}},
        idle_cpu_cores={"switchgear": 0.01},
        ceilings=[Ceiling(sequences=1, tokens_per_second=50_000)],
        runs=list(runs),
    )
