"""Deployments that export their spans to a collector of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local import default_model, topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.process import ProcessSpec
from deploy.local.topology import Component, Deployment, Engine
from deploy.pictures.collector import Collector, collecting

Report = Callable[[str], None]

READY_SECONDS = 600.0

_TRACED: tuple[Component, ...] = ("frontend", "router", "prefill_worker", "decode_worker")


class RunFailed(Exception):
    """What was to be seen did not happen. The text says what."""


@dataclass(frozen=True)
class Observed:
    """One that is ready."""

    deployment: Deployment
    cluster: LocalCluster
    collector: Collector
    specs: list[ProcessSpec]
    folder: Path
    """For what else the run writes; gone after it."""
    take_port: Callable[[], int]

    @property
    def url(self) -> str:
        return topology.http_url(self.deployment)

    def in_words(self) -> str:
        it = self.deployment
        engine = {"vllm": "vLLM on the CPU", "sim": "simulated engines"}[it.engine]
        decode_workers = f"{it.decode} decode worker{'s' if it.decode > 1 else ''}"
        return (
            f"{it.model_name}, {engine}: {it.frontends} frontend, {it.routers} router, "
            f"{it.indexers} KV indexer, {it.prefill} prefill worker, {decode_workers}"
        )


@contextmanager
def observed(
    engine: Engine, *, decode: int, flags: Mapping[Component, tuple[str, ...]], report: Report
) -> Iterator[Observed]:
    """Starts one with one prefill worker, and stops it at the end. Raises ClusterError."""
    model = default_model.model_folder if engine == "vllm" else default_model.tokenizer_folder
    take_port = FreePorts().take
    with (
        tempfile.TemporaryDirectory(prefix="switchgear-pictures-") as folder,
        collecting() as collector,
        LocalCluster(Path(folder) / "run") as cluster,
    ):
        exporting = ("--otlp-endpoint", collector.endpoint)
        deployment = Deployment(
            engine=engine,
            model=model(report),
            model_name=default_model.NAME,
            prefill=1,
            decode=decode,
            http_port=take_port(),
            flags={each: (*exporting, *flags.get(each, ())) for each in _TRACED},
        )
        specs = topology.processes(deployment, cluster.run_dir, take_port)
        it = Observed(deployment, cluster, collector, specs, Path(folder), take_port)
        report(f"starting {it.in_words()}")
        cluster.start(specs)
        cluster.wait_ready(READY_SECONDS)
        yield it
