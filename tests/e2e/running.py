"""A whole deployment for tests: real processes, real etcd and NATS, as `make up` starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from deploy.local import certificates, etcd_accounts, topology
from deploy.local.cluster import LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.topology import Component, Deployment, Engine
from libs.common.channels import Channels
from libs.common.identity import CLIENT

LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 60
"""Some 600 tokens: enough to be worth a prefill worker."""


@dataclass(frozen=True)
class Answer:
    """One finished call."""

    status: int
    headers: httpx.Headers
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"]["content"])

    @property
    def cached_tokens(self) -> int:
        return int(self.body["usage"]["prompt_tokens_details"]["cached_tokens"])

    @property
    def prefill_worker(self) -> str | None:
        name: str | None = self.headers.get("x-switchgear-prefill-worker")
        return name

    @property
    def decode_worker(self) -> str | None:
        name: str | None = self.headers.get("x-switchgear-decode-worker")
        return name


class Running:
    """A deployment and its clients."""

    def __init__(self, cluster: LocalCluster, deployment: Deployment) -> None:
        self.cluster = cluster
        self.model = deployment.model_name
        self.url = topology.http_url(deployment)
        self.secured = topology.certificates_folder(cluster.run_dir)
        """Where certificates and passwords are, with `tls`."""
        self._channels = Channels(
            certificates.files_of(self.secured, CLIENT) if deployment.tls else None
        )

    def chat(self, prompt: str, headers: dict[str, str] | None = None, **options: object) -> Answer:
        """One chat completion, not streamed."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 8,
            "temperature": 0,
            **options,
        }
        response = httpx.post(
            f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=120
        )
        return Answer(response.status_code, response.headers, response.json())

    def channel(self, service: str) -> grpc.aio.Channel:
        """A channel to the gRPC port of a process such as router-0."""
        return self._channels.open(self.grpc_address(service), service.rpartition("-")[0])

    def grpc_address(self, service: str) -> str:
        """host:port of a process such as router-0."""
        return f"127.0.0.1:{self.cluster.process(service).spec.ports['grpc']}"

    def metric(self, service: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples of one process; 0 when there are none."""
        ports = self.cluster.process(service).spec.ports
        # Launchers of earlier versions left a frontend's to its HTTP port.
        port = ports.get("metrics") or ports["http"]
        total = 0.0
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            found, _, rest = sample.partition("{")
            if found == name and all(f'{key}="{want}"' in rest for key, want in labels.items()):
                total += float(value)
        return total


@contextmanager
def running(
    run_dir: Path,
    *,
    engine: Engine,
    model: Path,
    model_name: str = "test-model",
    flags: dict[Component, tuple[str, ...]] | None = None,
    ready_seconds: float = 60,
    **counts: int,
) -> Iterator[Running]:
    """Starts a deployment and waits until it serves; stops all of it at the end."""
    ports = FreePorts()
    deployment = Deployment.model_validate(
        {
            "engine": engine,
            "model": model,
            "model_name": model_name,
            "dtype": "float32",
            "http_port": ports.take(),
            "flags": flags or {},
            **counts,
        }
    )
    secured = topology.certificates_folder(run_dir)
    if deployment.tls:
        certificates.make(secured)
    with LocalCluster(run_dir) as cluster:
        cluster.start(topology.processes(deployment, run_dir, ports.take))
        if deployment.tls:
            etcd_accounts.require_passwords(cluster.process("etcd-0").spec.address, secured)
        cluster.wait_ready(ready_seconds)
        yield Running(cluster, deployment)


async def stream(
    client: httpx.AsyncClient, body: dict[str, object], path: str = "/v1/chat/completions"
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed call; ends with [DONE], and fails without it."""
    async with client.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def text_of(event: dict[str, Any]) -> str:
    """The text that a chunk of a chat adds."""
    assert "error" not in event, event
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def command(deployment: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m deploy.local`, as typed in a shell."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "deploy.local", *arguments),
            *("--run-dir", str(deployment.cluster.run_dir)),
        ],
        cwd=topology.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
