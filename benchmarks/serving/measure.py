"""One run: load on one system, with a look at its answers, its CPU time and its memory."""

import asyncio
import math
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.serving import probe
from benchmarks.serving.load import run_wrk
from benchmarks.serving.probe import Answer, ProbeError
from benchmarks.serving.results import Check, ProbeRecord, Run
from benchmarks.serving.scenarios import Body, Scenario, body
from benchmarks.serving.systems import System

_START_UP_PART = 0.25
"""Of a run, before anything is counted: clients begin together, and then drift apart."""
_END_SECONDS = 0.3
"""Before wrk's end; it also takes a moment to begin."""
_PROBE_INTERVAL_SECONDS = 0.2
_PROBES_PER_CLIENT = 1 / 16
"""At most, so that probes are no load to speak of."""
_PROBED_PART = 0.75
"""Of a run. Probes sent later would still be waiting when the load is gone, and look too good."""
_CHECKS = 5
_SHOWN_FAILURES = 3
_IDLE_CPU_CORES = 0.25
_IDLE_LOOK_SECONDS = 0.5
_IDLE_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Usage:
    """CPU seconds so far and memory now, by role; and CPU seconds of the whole machine."""

    tenth: int
    """When, in tenths of a second since 1970."""
    cpu_seconds: Mapping[str, float]
    resident_bytes: Mapping[str, int]
    machine_cpu_seconds: float


async def check(system: System, scenario: Scenario) -> Check:
    """Asks as the load will, but for the usage as well, which must name every token.

    Raises ProbeError when it does not.
    """
    asked = body(scenario, system.model_name, with_usage=True).of_run(secrets.token_hex(4))
    answers = [await probe.ask(system.url, asked.text(f"check-{i}")) for i in range(_CHECKS)]
    for answer in answers:
        if answer.usage["completion_tokens"] != scenario.output_tokens:
            raise ProbeError(f"{system.name} gave {answer.usage}, not {scenario.output_tokens}")
    gaps = [
        (answer.last_text_seconds - answer.first_text_seconds) / (scenario.output_tokens - 1)
        for answer in answers
        if scenario.output_tokens > 1
    ]
    return Check(
        prompt_tokens=answers[-1].usage["prompt_tokens"],
        output_tokens=answers[-1].usage["completion_tokens"],
        step_ms=1_000 * statistics.median(gaps) if gaps else 0.0,
    )


async def run(system: System, scenario: Scenario, *, seconds: float, round_number: int) -> Run:
    """Loads the system for so long.

    A single client is probed after its load, since a second one beside it would show.
    """
    asked = body(scenario, system.model_name).of_run(secrets.token_hex(4))
    is_beside = scenario.is_streamed and scenario.clients > 1
    probing = asyncio.create_task(_probe(system, asked, scenario, seconds)) if is_beside else None
    looking = asyncio.create_task(_look(system, seconds))
    try:
        outcome, load_generator_cpu_seconds = await run_wrk(
            system.url, asked, clients=scenario.clients, duration_seconds=seconds
        )
        before, after = await looking
        answers = await probing if probing else await _probe(system, asked, scenario, seconds)
    finally:
        for task in filter(None, (probing, looking)):
            task.cancel()
            await asyncio.wait({task})
    failed = [answer for answer in answers if isinstance(answer, ProbeError)]
    for error in failed[:_SHOWN_FAILURES]:
        print(f"{system.name}: {error}")
    cpu_seconds = {
        role: spent - before.cpu_seconds.get(role, 0.0) for role, spent in after.cpu_seconds.items()
    }
    window_seconds = (after.tenth - before.tenth) / 10
    load_generator_cpu_cores = load_generator_cpu_seconds / seconds
    known_cpu_seconds = sum(cpu_seconds.values()) + load_generator_cpu_cores * window_seconds
    machine_cpu_seconds = after.machine_cpu_seconds - before.machine_cpu_seconds
    good = [answer for answer in answers if isinstance(answer, Answer)]
    window = range(before.tenth, after.tenth)
    return Run(
        scenario=scenario.name,
        system=system.name,
        round=round_number,
        window_seconds=window_seconds,
        answers=outcome.answers_between(before.tenth, after.tenth),
        probe_answers=sum(int(10 * answer.ended_at) in window for answer in good),
        refused_answers=outcome.status_errors,
        socket_errors=outcome.socket_errors,
        timeouts=outcome.timeouts,
        latency_p50_seconds=outcome.latency_p50_us / 1e6,
        latency_p99_seconds=outcome.latency_p99_us / 1e6,
        output_tokens=scenario.output_tokens,
        is_streamed=scenario.is_streamed,
        failed_probes=len(failed),
        probes=[_record(answer) for answer in good],
        cpu_seconds=cpu_seconds,
        resident_bytes=dict(after.resident_bytes),
        load_generator_cpu_cores=load_generator_cpu_cores,
        other_cpu_seconds=max(0.0, machine_cpu_seconds - known_cpu_seconds),
    )


async def _look(system: System, seconds: float) -> tuple[_Usage, _Usage]:
    """At the beginning and the end of the part of a run that counts."""
    await _until_next_tenth(_START_UP_PART * seconds)
    before = _usage(system)
    await _until_next_tenth((1 - _START_UP_PART) * seconds - _END_SECONDS)
    return before, _usage(system)


async def _until_next_tenth(at_least_seconds: float) -> None:
    """Ends where a tenth of a second does, since answers are counted by tenths."""
    until = time.time() + at_least_seconds
    await asyncio.sleep(math.ceil(10 * until) / 10 - time.time())


async def _probe(
    system: System, asked: Body, scenario: Scenario, seconds: float
) -> Sequence[Answer | ProbeError]:
    """None for answers in one piece, in which a first token cannot be seen."""
    if not scenario.is_streamed:
        return []
    if scenario.clients == 1:
        return await probe.probe_in_turn(system.url, asked, duration_seconds=seconds / 2)
    return await probe.probe_regularly(
        system.url,
        asked,
        interval_seconds=_PROBE_INTERVAL_SECONDS,
        most_at_once=max(1, round(_PROBES_PER_CLIENT * scenario.clients)),
        duration_seconds=_PROBED_PART * seconds,
    )


async def idle_cpu_cores(system: System, *, seconds: float) -> float:
    """What the system takes while nobody asks for anything."""
    before = sum(_usage(system).cpu_seconds.values())
    await asyncio.sleep(seconds)
    return (sum(_usage(system).cpu_seconds.values()) - before) / seconds


async def settle(system: System) -> None:
    """Waits until the system is done with what its clients abandoned, but not for ever."""
    try:
        async with asyncio.timeout(_IDLE_TIMEOUT_SECONDS):
            while await idle_cpu_cores(system, seconds=_IDLE_LOOK_SECONDS) > _IDLE_CPU_CORES:
                pass
    except TimeoutError:
        print(f"{system.name} is still busy {_IDLE_TIMEOUT_SECONDS:.0f} s after its load ended")


def _usage(system: System) -> _Usage:
    cpu_seconds: dict[str, float] = {}
    resident_bytes: dict[str, int] = {}
    for role, pids in system.pids_by_role().items():
        for pid in pids:
            process = psutil.Process(pid)
            times = process.cpu_times()
            cpu_seconds[role] = cpu_seconds.get(role, 0.0) + times.user + times.system
            resident_bytes[role] = resident_bytes.get(role, 0) + process.memory_info().rss
    machine = psutil.cpu_times()
    busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
    return _Usage(round(10 * time.time()), cpu_seconds, resident_bytes, busy)


def _record(answer: Answer) -> ProbeRecord:
    return ProbeRecord(
        ttft_seconds=answer.first_text_seconds,
        total_seconds=answer.total_seconds,
        text_events=answer.text_events,
    )
