"""Which processes make up a deployment, and with which flags. Decides only; starts nothing."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.envoy.configuration import Address, configuration
from deploy.local import certificates
from deploy.local.probe import Probe, ProbeTls
from deploy.local.process import ProcessSpec
from libs.common.identity import certificate_name

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = "local"
HOST = "127.0.0.1"

Engine = Literal["vllm", "sim"]
Component = Literal["kv_indexer", "router", "prefill_worker", "decode_worker", "frontend"]
Count = Annotated[int, Field(ge=0)]

(
    SERVERS_STAGE,
    WORKERS_STAGE,
    _INDEXERS_STAGE,
    _ROUTERS_STAGE,
    _EDGE_STAGE,
    FRONTENDS_STAGE,
) = range(6)

# vLLM on a CPU takes multiples of 32 tokens only.
_VLLM_BLOCK_SIZE_TOKENS = 32
# Of a CPU's memory, when nothing else is asked for: all of it is resident from the start.
_CPU_KV_CACHE_BYTES = 512 * 2**20
# What the workers of one GPU share. The rest is for CUDA itself, and for others.
_GPU_MEMORY_FRACTION = 0.88

# The others send or follow KV events, or keep responses.
_WITHOUT_NATS = ("router",)

# Where an OpenTelemetry collector on this machine would be.
_OTLP_PORT = 4317

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
    embed: Count = 0
    """Workers beside them that embed, and do not generate."""
    embed_model: Path | None = None
    """Their model; None is the same as the others'."""
    embed_model_name: str = ""
    """What clients call it; empty is `model_name` with -embed behind it."""
    frontends: Annotated[int, Field(ge=1)] = 1
    """They share the HTTP port, unless Envoy has it."""
    routers: Annotated[int, Field(ge=1)] = 1
    indexers: Count = 1
    """With none, routing goes by load alone."""
    http_port: int
    envoy: bool = False
    """Whether Envoy is in front, on the HTTP port, for REST and gRPC."""
    gpus: Count = 0
    """GPUs to spread the workers over."""
    kv_cache_bytes: Count = 0
    """For each vLLM worker; 0 takes 512 MiB on a CPU and a fair share of a GPU."""
    max_model_len_tokens: Count = 0
    """Prompt and output together; 0 takes the model's own limit."""
    tls: bool = False
    """Whether services, etcd and NATS show certificates, and the latter two ask for passwords. What
    that takes is then in the run folder's `certificates`, and etcd is told of its users when it
    has started."""
    sim_step_ms: Annotated[float, Field(gt=0)] | None = None
    """Simulated engines take that long for every step that decodes, and no time for prompts; None
    leaves them their own timing."""
    flags: dict[Component, tuple[str, ...]] = {}
    """Further flags for all processes of a component."""

    @property
    def embedding_model(self) -> str:
        """What clients call the model that embeds."""
        return self.embed_model_name or f"{self.model_name}-embed"


def processes(
    deployment: Deployment, run_dir: Path, take_port: Callable[[], int]
) -> list[ProcessSpec]:
    """Every process of the deployment. `take_port` gives a port that nothing else uses."""
    secured = certificates_folder(run_dir) if deployment.tls else None
    etcd = etcd_server(run_dir, take_port, secured)
    nats = nats_server(run_dir, take_port, secured)
    services = list(_Services(deployment, etcd, nats, take_port, secured).all())
    edge = [envoy(deployment, services, take_port, secured)] if deployment.envoy else []
    return [etcd, nats, *services, *edge]


def certificates_folder(run_dir: Path) -> Path:
    """Where a deployment's certificates and passwords are, if it has any."""
    return run_dir.absolute() / "certificates"


def http_url(deployment: Deployment) -> str:
    return f"http://{HOST}:{deployment.http_port}"


class _Services:
    def __init__(
        self,
        deployment: Deployment,
        etcd: ProcessSpec,
        nats: ProcessSpec,
        take_port: Callable[[], int],
        secured: Path | None,
    ) -> None:
        self._deployment = deployment
        self._secured = secured
        self._etcd_url, self._nats_url = etcd.address, nats.address
        self._take_port = take_port

    def all(self) -> Iterable[ProcessSpec]:
        deployment = self._deployment
        for i in range(deployment.prefill):
            yield self._worker("prefill_worker", i, place=i)
        for i in range(deployment.decode):
            yield self._worker("decode_worker", i, place=deployment.prefill + i)
        for i in range(deployment.decode, deployment.decode + deployment.embed):
            place = deployment.prefill + i
            yield self._worker("decode_worker", i, place=place, embeds=True)
        for i in range(deployment.indexers):
            yield self._service("kv_indexer", i, _INDEXERS_STAGE)
        for i in range(deployment.routers):
            yield self._service("router", i, _ROUTERS_STAGE)
        for i in range(deployment.frontends):
            yield self._frontend(i)

    def _worker(
        self, component: Component, number: int, place: int, *, embeds: bool = False
    ) -> ProcessSpec:
        deployment = self._deployment
        flags = ["--engine", deployment.engine]
        if embeds:
            flags += ["--model", str(deployment.embed_model or deployment.model)]
            flags += ["--served-model-name", deployment.embedding_model, "--task", "embed"]
        else:
            flags += ["--model", str(deployment.model)]
            flags += ["--served-model-name", deployment.model_name]
        if deployment.max_model_len_tokens:
            flags += ["--max-model-len-tokens", str(deployment.max_model_len_tokens)]
        if deployment.engine == "sim":
            if deployment.sim_step_ms is not None:
                flags += ["--sim-timing", "fixed", "--sim-step-ms", str(deployment.sim_step_ms)]
            return self._service(component, number, WORKERS_STAGE, flags)
        nixl_port = self._take_port()
        flags += ["--dtype", deployment.dtype]
        flags += ["--block-size-tokens", str(_VLLM_BLOCK_SIZE_TOKENS)]
        flags += self._memory_flags()
        flags += ["--nixl-port", str(nixl_port)]
        return self._service(
            component,
            number,
            WORKERS_STAGE,
            flags,
            ports={"nixl": nixl_port},
            python=str(REPOSITORY / ".venv-vllm" / "bin" / "python"),
            environment=self._vllm_environment(place),
        )

    @property
    def _workers(self) -> int:
        return self._deployment.prefill + self._deployment.decode + self._deployment.embed

    def _memory_flags(self) -> list[str]:
        gpus, kv_cache_bytes = self._deployment.gpus, self._deployment.kv_cache_bytes
        flags = []
        if kv_cache_bytes or not gpus:
            flags += ["--kv-cache-bytes", str(kv_cache_bytes or _CPU_KV_CACHE_BYTES)]
        if gpus:
            workers_on_one = -(-self._workers // gpus)
            flags += ["--device-memory-fraction", f"{_GPU_MEMORY_FRACTION / workers_on_one:.3f}"]
        return flags

    def _vllm_environment(self, place: int) -> dict[str, str]:
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if self._deployment.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % self._deployment.gpus)
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._workers))
            # One process fewer for each engine, and its memory.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return environment

    def _frontend(self, number: int) -> ProcessSpec:
        deployment = self._deployment
        # Behind Envoy each has one of its own, so that each can be asked for its health.
        http_port = self._take_port() if deployment.envoy else deployment.http_port
        url = f"http://{HOST}:{http_port}"
        probes = [Probe(kind="http", target=f"{url}/health")]
        # With API keys only their holders may see what is served.
        has_keys = os.environ.get("SWITCHGEAR_FRONTEND_API_KEYS", "none") != "none"
        if not has_keys and "--api-keys" not in deployment.flags.get("frontend", ()):
            names = [deployment.model_name]
            names += [deployment.embedding_model] if deployment.embed else []
            probes += [
                Probe(kind="http", target=f"{url}/v1/models", contains=f'"{name}"')
                for name in names
            ]
        return self._service(
            "frontend",
            number,
            FRONTENDS_STAGE,
            ["--http-port", str(http_port)],
            ports={"http": http_port},
            address=url,
            probes=tuple(probes),
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
        # A frontend's are on its HTTP port only without API keys, and of one of several.
        ports = {"grpc": self._take_port(), "metrics": self._take_port()} | (ports or {})
        command = [python, "-m", f"services.{component}", "--name", name]
        command += ["--namespace", NAMESPACE]
        command += ["--etcd-url", self._etcd_url]
        if component not in _WITHOUT_NATS:
            command += ["--nats-url", self._nats_url]
        command += ["--host", HOST, "--grpc-port", str(ports["grpc"])]
        command += ["--metrics-port", str(ports["metrics"])]
        command += [*flags, *self._deployment.flags.get(component, ())]
        grpc_address = f"{HOST}:{ports['grpc']}"
        tls = None
        if self._secured is not None:
            shown = _shown_by(self._secured, component)
            tls = ProbeTls(**shown, name=certificate_name(component))
        return ProcessSpec(
            name=name,
            command=tuple(command),
            environment=_service_environment(component, self._secured) | (environment or {}),
            ports=ports,
            address=address or grpc_address,
            probes=(Probe(kind="grpc", target=grpc_address, tls=tls), *probes),
            stage=stage,
        )


def _service_environment(component: Component, secured: Path | None) -> dict[str, str]:
    """What a service needs, and the settings that the launcher was given for it.

    The latter are in the launcher's environment anyway; they are named here so that a restart from
    another shell has them too.
    """
    prefix = f"SWITCHGEAR_{component.upper()}"
    settings = {f"{prefix}_DRAIN_SECONDS": str(_DRAIN_SECONDS)}
    if secured is not None:
        for part, path in _shown_by(secured, component).items():
            settings[f"{prefix}_TLS_{part.upper()}_FILE"] = str(path)
        for server in ("ETCD",) if component in _WITHOUT_NATS else ("ETCD", "NATS"):
            settings[f"{prefix}_{server}_USERNAME"] = certificates.USERNAME
            password = secured / f"{server.lower()}.password"
            settings[f"{prefix}_{server}_PASSWORD_FILE"] = str(password)
    settings |= {key: value for key, value in os.environ.items() if key.startswith("SWITCHGEAR_")}
    python_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "build" / "proto")])
    return settings | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}


def _shown_by(secured: Path, component: str) -> dict[str, Path]:
    files = certificates.files_of(secured, component)
    shown = {"ca": files.ca, "certificate": files.certificate, "key": files.key}
    return {part: path for part, path in shown.items() if path is not None}


def etcd_server(
    run_dir: Path, take_port: Callable[[], int], secured: Path | None = None
) -> ProcessSpec:
    """An etcd of its own, whose `address` is its URL. With a folder of certificates it takes none
    but connections that show one; its peers' port, which nobody uses, stays as it is."""
    ports = {"client": take_port(), "peer": take_port()}
    client_url, peer_url = (f"http://{HOST}:{port}" for port in ports.values())
    health_url = client_url
    tls_flags: list[str] = []
    if secured is not None:
        ports["metrics"] = take_port()
        client_url = f"https://{HOST}:{ports['client']}"
        health_url = f"http://{HOST}:{ports['metrics']}"
        shown = _shown_by(secured, "etcd")
        tls_flags = ["--client-cert-auth", "--listen-metrics-urls", health_url]
        # Every connection of every process checks a password, all at once when etcd starts.
        tls_flags += ["--bcrypt-cost", "4"]
        tls_flags += ["--trusted-ca-file", str(shown["ca"])]
        tls_flags += ["--cert-file", str(shown["certificate"]), "--key-file", str(shown["key"])]
    command = [_server_binary("etcd"), "--name", "etcd-0", "--log-level", "warn"]
    command += ["--data-dir", str(run_dir.absolute() / "etcd-0.data"), "--unsafe-no-fsync"]
    command += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
    command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    command += ["--initial-cluster", f"etcd-0={peer_url}", *tls_flags]
    return ProcessSpec(
        name="etcd-0",
        command=tuple(command),
        ports=ports,
        address=client_url,
        probes=(Probe(kind="http", target=f"{health_url}/health", contains='"true"'),),
        stage=SERVERS_STAGE,
    )


def nats_server(
    run_dir: Path, take_port: Callable[[], int], secured: Path | None = None
) -> ProcessSpec:
    """A NATS server of its own, whose `address` is its URL. It can keep streams, which frontends
    make when they are told to keep responses. With a folder of certificates it takes none but
    connections that show one, and a password."""
    port = take_port()
    address = f"{HOST}:{port}"
    command = [_server_binary("nats-server"), "--addr", HOST, "--port", str(port)]
    command += ["--jetstream", "--store_dir", str(run_dir.absolute() / "nats-0.data")]
    if secured is not None:
        command += ["--config", str(secured / "nats.conf")]
    return ProcessSpec(
        name="nats-0",
        command=tuple(command),
        ports={"client": port},
        address=f"{'tls' if secured else 'nats'}://{address}",
        probes=(Probe(kind="nats", target=address),),
        stage=SERVERS_STAGE,
    )


def envoy(
    deployment: Deployment,
    services: Iterable[ProcessSpec],
    take_port: Callable[[], int],
    secured: Path | None = None,
) -> ProcessSpec:
    """Envoy in front of all frontends and routers, with the configuration of any deployment."""
    services = list(services)

    def addresses(component: Component, port: str) -> list[Address]:
        found = [spec for spec in services if spec.name.startswith(f"{component}-")]
        return [Address(HOST, spec.ports[port]) for spec in found]

    url, admin_port, metrics_port = http_url(deployment), take_port(), take_port()
    config = configuration(
        listen=Address(HOST, deployment.http_port),
        metrics=Address(HOST, metrics_port),
        admin=Address(HOST, admin_port),
        clusters={
            "frontend_rest": addresses("frontend", "http"),
            "frontend_grpc": addresses("frontend", "grpc"),
            "router_grpc": addresses("router", "grpc"),
            "otel_collector": [Address(HOST, _OTLP_PORT)],
        },
        services_ca=secured and secured / "ca.crt",
    )
    command = [_server_binary("envoy"), "--config-yaml", json.dumps(config)]
    # Without it several Envoys on a host would take each other for what they are to replace.
    command += ["--disable-hot-restart", "--log-level", "warning", "--concurrency", "1"]
    return ProcessSpec(
        name="envoy-0",
        command=tuple(command),
        ports={"http": deployment.http_port, "admin": admin_port, "metrics": metrics_port},
        address=url,
        probes=(
            Probe(kind="http", target=f"http://{HOST}:{admin_port}/ready"),
            Probe(kind="http", target=f"{url}/health"),
        ),
        stage=_EDGE_STAGE,
    )


def _server_binary(name: str) -> str:
    """The servers are installed beside the interpreter, by packages that carry them."""
    return str(Path(sys.executable).parent / name)
