"""Which processes make up a deployment, and with which flags. Decides only; starts nothing."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.local.probe import Probe
from deploy.local.process import ProcessSpec

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = "local"
HOST = "127.0.0.1"

Engine = Literal["vllm", "sim"]
Component = Literal["kv_indexer", "router", "prefill_worker", "decode_worker", "frontend"]
Count = Annotated[int, Field(ge=0)]

_SERVERS_STAGE, _WORKERS_STAGE, _INDEXERS_STAGE, _ROUTERS_STAGE, _FRONTENDS_STAGE = range(5)

# vLLM on a CPU takes multiples of 32 tokens only.
_VLLM_BLOCK_SIZE_TOKENS = 32
# Said outright, so that several workers fit on one GPU. On a CPU all of it is resident.
_VLLM_KV_CACHE_BYTES = 512 * 2**20

# Well within the grace that a process has to stop. A person waits for it.
_DRAIN_SECONDS = 5


class Deployment(BaseModel):
    """What a person chooses about a deployment on one machine."""

    model_config = ConfigDict(frozen=True)

    engine: Engine
    model: Path
    """A Hugging Face folder. The simulator needs its tokenizer only."""
    model_name: str
    """What clients call the model."""
    dtype: str = "bfloat16"
    prefill: Count = 1
    """Prefill workers. With none, decode workers compute prompts too."""
    decode: Annotated[int, Field(ge=1)] = 1
    frontends: Annotated[int, Field(ge=1)] = 1
    """They share the HTTP port."""
    routers: Annotated[int, Field(ge=1)] = 1
    indexers: Count = 1
    """With none, routing goes by load alone."""
    http_port: int
    has_gpu: bool = False
    flags: dict[Component, tuple[str, ...]] = {}
    """Further flags for all processes of a component."""


def processes(
    deployment: Deployment, run_dir: Path, take_port: Callable[[], int]
) -> list[ProcessSpec]:
    """Every process of the deployment. `take_port` gives a port that nothing else uses."""
    etcd = _etcd(run_dir, take_port)
    nats = _nats(take_port)
    return [etcd, nats, *_Services(deployment, etcd, nats, take_port).all()]


def http_url(deployment: Deployment) -> str:
    return f"http://{HOST}:{deployment.http_port}"


class _Services:
    def __init__(
        self,
        deployment: Deployment,
        etcd: ProcessSpec,
        nats: ProcessSpec,
        take_port: Callable[[], int],
    ) -> None:
        self._deployment = deployment
        self._etcd_url, self._nats_url = etcd.address, nats.address
        self._take_port = take_port

    def all(self) -> Iterable[ProcessSpec]:
        deployment = self._deployment
        for i in range(deployment.prefill):
            yield self._worker("prefill_worker", i)
        for i in range(deployment.decode):
            yield self._worker("decode_worker", i)
        for i in range(deployment.indexers):
            yield self._service("kv_indexer", i, _INDEXERS_STAGE)
        for i in range(deployment.routers):
            yield self._service("router", i, _ROUTERS_STAGE)
        for i in range(deployment.frontends):
            yield self._frontend(i)

    def _worker(self, component: Component, number: int) -> ProcessSpec:
        deployment = self._deployment
        flags = ["--engine", deployment.engine]
        flags += ["--model", str(deployment.model)]
        flags += ["--served-model-name", deployment.model_name]
        if deployment.engine == "sim":
            return self._service(component, number, _WORKERS_STAGE, flags)
        nixl_port = self._take_port()
        flags += ["--dtype", deployment.dtype]
        flags += ["--block-size-tokens", str(_VLLM_BLOCK_SIZE_TOKENS)]
        flags += ["--kv-cache-bytes", str(_VLLM_KV_CACHE_BYTES)]
        flags += ["--nixl-port", str(nixl_port)]
        return self._service(
            component,
            number,
            _WORKERS_STAGE,
            flags,
            ports={"nixl": nixl_port},
            python=str(REPOSITORY / ".venv-vllm" / "bin" / "python"),
            environment=self._vllm_environment(),
        )

    def _vllm_environment(self) -> dict[str, str]:
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if not self._deployment.has_gpu:
            workers = self._deployment.prefill + self._deployment.decode
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
            # One process fewer for each engine, and its memory.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return environment

    def _frontend(self, number: int) -> ProcessSpec:
        http_port = self._deployment.http_port
        url = http_url(self._deployment)
        return self._service(
            "frontend",
            number,
            _FRONTENDS_STAGE,
            ["--http-port", str(http_port)],
            ports={"http": http_port},
            address=url,
            probes=(
                Probe(kind="http", target=f"{url}/health"),
                Probe(
                    kind="http",
                    target=f"{url}/v1/models",
                    contains=f'"{self._deployment.model_name}"',
                ),
            ),
        )

    def _service(
        self,
        component: Component,
        number: int,
        stage: int,
        flags: Iterable[str] = (),
        *,
        ports: dict[str, int] | None = None,
        address: str = "",
        probes: tuple[Probe, ...] = (),
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> ProcessSpec:
        name = f"{component}-{number}"
        ports = {"grpc": self._take_port()} | (ports or {})
        if component != "frontend":  # Its metrics are on its HTTP port.
            ports["metrics"] = self._take_port()
        command = [python, "-m", f"services.{component}", "--name", name]
        command += ["--namespace", NAMESPACE]
        command += ["--etcd-url", self._etcd_url, "--nats-url", self._nats_url]
        command += ["--host", HOST, "--grpc-port", str(ports["grpc"])]
        if "metrics" in ports:
            command += ["--metrics-port", str(ports["metrics"])]
        command += [*flags, *self._deployment.flags.get(component, ())]
        grpc_address = f"{HOST}:{ports['grpc']}"
        return ProcessSpec(
            name=name,
            command=tuple(command),
            environment=_service_environment(component) | (environment or {}),
            ports=ports,
            address=address or grpc_address,
            probes=(Probe(kind="grpc", target=grpc_address), *probes),
            stage=stage,
        )


def _service_environment(component: Component) -> dict[str, str]:
    """What a service needs, and the settings that the launcher was given for it.

    The latter are in the launcher's environment anyway; they are named here so that a restart from
    another shell has them too.
    """
    settings = {f"SWITCHGEAR_{component.upper()}_DRAIN_SECONDS": str(_DRAIN_SECONDS)}
    settings |= {key: value for key, value in os.environ.items() if key.startswith("SWITCHGEAR_")}
    python_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "build" / "proto")])
    return settings | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}


def _etcd(run_dir: Path, take_port: Callable[[], int]) -> ProcessSpec:
    ports = {"client": take_port(), "peer": take_port()}
    client_url, peer_url = (f"http://{HOST}:{port}" for port in ports.values())
    command = [_server_binary("etcd"), "--name", "etcd-0", "--log-level", "warn"]
    command += ["--data-dir", str(run_dir.absolute() / "etcd-0.data"), "--unsafe-no-fsync"]
    command += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
    command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    command += ["--initial-cluster", f"etcd-0={peer_url}"]
    return ProcessSpec(
        name="etcd-0",
        command=tuple(command),
        ports=ports,
        address=client_url,
        probes=(Probe(kind="http", target=f"{client_url}/health", contains='"true"'),),
        stage=_SERVERS_STAGE,
    )


def _nats(take_port: Callable[[], int]) -> ProcessSpec:
    port = take_port()
    address = f"{HOST}:{port}"
    return ProcessSpec(
        name="nats-0",
        command=(_server_binary("nats-server"), "--addr", HOST, "--port", str(port)),
        ports={"client": port},
        address=f"nats://{address}",
        probes=(Probe(kind="nats", target=address),),
        stage=_SERVERS_STAGE,
    )


def _server_binary(name: str) -> str:
    """The servers are installed beside the interpreter, by packages that carry them."""
    return str(Path(sys.executable).parent / name)
