"""What tracing costs: the same load on three simulated deployments in turns, of whose requests none
is traced, 1 %, and all.

    python -m benchmarks.tracing --rounds 3
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.serving.load import run_wrk
from benchmarks.serving.scenarios import Scenario, body
from benchmarks.tracing.collector import discarding
from deploy.local import default_model, topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.topology import Component, Deployment

RATIOS = (None, 0.01, 1.0)
"""None: no tracing."""
SCENARIOS = (
    Scenario(name="chat", clients=128, output_tokens=64),
    Scenario(name="one token", clients=64, output_tokens=1, is_streamed=False),
)
READY_SECONDS = 120.0
SERVICES: tuple[Component, ...] = ("frontend", "router", "decode_worker")


class _Traced:
    """A deployment with one ratio."""

    def __init__(self, ratio: float | None, endpoint: str, folder: Path, ports: FreePorts) -> None:
        flags: dict[Component, tuple[str, ...]] = {}
        if ratio is not None:
            flags = dict.fromkeys(SERVICES, ("--otlp-endpoint", endpoint))
            flags["frontend"] += ("--trace-sample-ratio", str(ratio))
        self.name = "off" if ratio is None else f"{ratio:.0%}"
        self.deployment = Deployment(
            engine="sim",
            model=default_model.tokenizer_folder(print),
            model_name="bench",
            prefill=0,
            decode=4,
            http_port=ports.take(),
            sim_step_ms=6.0,
            flags=flags,
        )
        self.cluster = LocalCluster(folder / self.name)
        self._ports = ports

    def start(self) -> None:
        specs = topology.processes(self.deployment, self.cluster.run_dir, self._ports.take)
        self.cluster.start(specs)
        self.cluster.wait_ready(READY_SECONDS)

    def cpu_seconds(self) -> float:
        """Of all its services so far; exporter threads are part of them."""
        times = [
            psutil.Process(process.pid).cpu_times()
            for process in self.cluster.processes()
            if not process.name.startswith(("etcd", "nats"))
        ]
        return sum(each.user + each.system for each in times)

    async def run(self, scenario: Scenario, seconds: float) -> tuple[float, float]:
        """Requests a second, and CPU microseconds a token."""
        asked = body(scenario, self.deployment.model_name).of_run(secrets.token_hex(4))
        before = self.cpu_seconds()
        outcome, _ = await run_wrk(
            f"{topology.http_url(self.deployment)}/v1/chat/completions",
            asked,
            clients=scenario.clients,
            duration_seconds=seconds,
        )
        used_seconds = self.cpu_seconds() - before
        if outcome.status_errors or outcome.socket_errors or outcome.timeouts:
            raise RuntimeError(f"{self.name}: requests failed: {outcome}")
        tokens = outcome.requests * scenario.output_tokens
        return outcome.requests / seconds, 1e6 * used_seconds / tokens


async def _measure(rounds: int, seconds: float, pause_seconds: float) -> None:
    ports = FreePorts()
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="switchgear-tracing-"))
        )
        endpoint = stack.enter_context(discarding())
        systems = []
        for ratio in RATIOS:
            system = _Traced(ratio, endpoint, folder, ports)
            stack.enter_context(system.cluster)
            system.start()
            systems.append(system)
            for scenario in SCENARIOS:  # To warm it up.
                await system.run(scenario, 1)
        for number in range(rounds):
            await asyncio.sleep(pause_seconds)
            print(f"round {number + 1}", flush=True)
            turn = number % len(systems)
            for scenario in SCENARIOS:
                for system in systems[turn:] + systems[:turn]:
                    result = await system.run(scenario, seconds)
                    found[scenario.name, system.name].append(result)
                    print(f"{scenario.name:10} {system.name:5} {result[0]:7.1f} {result[1]:7.1f}")
        print("| load | traced | requests/s | CPU a token, µs |\n|---|---|---|---|")
        for (scenario_name, name), results in found.items():
            rates, costs = zip(*results, strict=True)
            print(
                f"| {scenario_name} | {name} | {statistics.median(rates):.0f} |"
                f" {statistics.median(costs):.1f} |"
            )


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=2, help="Of each run.")] = 8,
    pause_seconds: Annotated[float, typer.Option(min=0, help="Before each round.")] = 1,
) -> None:
    """Prints requests/s and CPU a token: the medians of the rounds."""
    asyncio.run(_measure(rounds, seconds, pause_seconds))


if __name__ == "__main__":
    typer.run(main)
