"""The systems as processes of this machine, with the same model name, folder and limits."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy.local import default_model, topology
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.probe import Probe
from deploy.local.process import ProcessSpec
from deploy.local.topology import HOST, REPOSITORY, Deployment

WORKERS = 4
BLOCK_SIZE_TOKENS = 16
KV_TOKENS = 524_288
"""Of each worker."""
CHUNK_TOKENS = 2_048
RUNNING_REQUESTS = 256
_CONTEXT_LENGTH_TOKENS = 131_072
DYNAMO_PYTHON = REPOSITORY / ".venv-dynamo" / "bin" / "python"
SMG = REPOSITORY / ".venv-smg" / "bin" / "smg"
_MODEL_NAME = "bench-model"
_READY_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class System:
    """A running deployment."""

    name: str
    cluster: LocalCluster
    url: str
    """Where chats are posted."""
    model_name: str

    def pids_by_role(self) -> dict[str, list[int]]:
        """The processes of each component, children included, the servers it depends on too."""
        roles: dict[str, list[int]] = {}
        for process in self.cluster.processes():
            roles.setdefault(process.name.rsplit("-", 1)[0], []).extend(process.session())
        return roles


def start_switchgear(
    cluster: LocalCluster, model: Path, *, step_ms: float, frontends: int = 1, routers: int = 1
) -> System:
    """As `make up ENGINE=sim SIM_STEP_MS=6 PREFILL=0 DECODE=4` does. Returns when it serves."""
    name = SWITCHGEAR if frontends == routers == 1 else f"{SWITCHGEAR} {frontends}+{routers}"
    take_port = FreePorts().take
    deployment = Deployment(
        engine="sim",
        model=model,
        model_name=_MODEL_NAME,
        prefill=0,
        decode=WORKERS,
        frontends=frontends,
        routers=routers,
        http_port=take_port(),
        sim_step_ms=step_ms,
        flags={
            "decode_worker": (
                *("--block-size-tokens", str(BLOCK_SIZE_TOKENS)),
                *("--sim-kv-tokens", str(KV_TOKENS)),
                *("--max-running-requests", str(RUNNING_REQUESTS)),
                *("--max-model-len-tokens", str(_CONTEXT_LENGTH_TOKENS)),
            )
        },
    )
    return _started(
        name,
        cluster,
        topology.processes(deployment, cluster.run_dir, take_port),
        deployment,
    )


def start_dynamo(
    cluster: LocalCluster, model: Path, *, step_ms: float, is_quiet: bool = True
) -> System:
    """Its frontend with KV routing and its mocker, with etcd and NATS. Returns when it serves.

    Quiet it logs errors only; otherwise what it logs as shipped.
    """
    if not DYNAMO_PYTHON.is_file():
        raise ClusterError("no .venv-dynamo here; use make bench")
    take_port = FreePorts().take
    cluster.run_dir.mkdir(parents=True, exist_ok=True)
    engine_arguments = cluster.run_dir / "mocker.args"
    engine_arguments.write_text(json.dumps(mocker_arguments(step_ms)))
    etcd = topology.etcd_server(cluster.run_dir, take_port)
    nats = topology.nats_server(cluster.run_dir, take_port)
    http_port = take_port()
    deployment = Deployment(engine="sim", model=model, model_name=_MODEL_NAME, http_port=http_port)
    processes = dynamo_processes(
        deployment, etcd, nats, engine_arguments, cluster.run_dir, is_quiet=is_quiet
    )
    name = DYNAMO if is_quiet else DYNAMO_AS_SHIPPED
    return _started(name, cluster, [etcd, nats, *processes], deployment)


def mocker_arguments(step_ms: float) -> dict[str, object]:
    """The mocker's engine, set as the simulator is. Its own timing slows down with KV usage."""
    return {
        "engine": {
            "backend": "vllm",
            "block_size": BLOCK_SIZE_TOKENS,
            "num_gpu_blocks": KV_TOKENS // BLOCK_SIZE_TOKENS,
            "max_num_seqs": RUNNING_REQUESTS,
            "max_num_batched_tokens": CHUNK_TOKENS,
            "timing_model": {"type": "fixed", "prefill_ms": 0.0, "decode_ms": step_ms},
        },
        "num_gpu_blocks_is_explicit": True,
        "dynamo": {"enable_local_indexer": True},
    }


def dynamo_processes(
    deployment: Deployment,
    etcd: ProcessSpec,
    nats: ProcessSpec,
    engine_arguments: Path,
    run_dir: Path,
    *,
    is_quiet: bool = True,
) -> list[ProcessSpec]:
    """Without the servers. Planes are Dynamo's defaults, but for events, which go over NATS."""
    environment = {
        "ETCD_ENDPOINTS": etcd.address,
        "NATS_SERVER": nats.address,
        **({"DYN_LOG": "error"} if is_quiet else {}),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(run_dir),  # It keeps copies of tokenizers there.
    }
    mocker = [str(DYNAMO_PYTHON), "-m", "dynamo.mocker"]
    mocker += ["--model-path", str(deployment.model), "--model-name", deployment.model_name]
    mocker += ["--num-workers", str(WORKERS), "--extra-engine-args", str(engine_arguments)]
    mocker += ["--block-size", str(BLOCK_SIZE_TOKENS), "--event-plane", "nats"]
    frontend = [str(DYNAMO_PYTHON), "-m", "dynamo.frontend", "--router-mode", "kv"]
    frontend += ["--http-host", HOST, "--http-port", str(deployment.http_port)]
    frontend += ["--kv-cache-block-size", str(BLOCK_SIZE_TOKENS), "--event-plane", "nats"]
    frontend += ["--router-min-initial-workers", str(WORKERS)]
    url = topology.http_url(deployment)
    return [
        ProcessSpec(
            name="mocker-0",
            command=tuple(mocker),
            environment=environment,
            stage=topology.WORKERS_STAGE,
        ),
        ProcessSpec(
            name="frontend-0",
            command=tuple(frontend),
            environment=environment,
            ports={"http": deployment.http_port},
            address=url,
            probes=(Probe(kind="http", target=f"{url}/v1/models", contains=deployment.model_name),),
            stage=topology.FRONTENDS_STAGE,
        ),
    ]


def start_smg(cluster: LocalCluster, model: Path, *, step_ms: float) -> System:
    """The gateway with its default policy, which routes by the text that workers have seen, before
    four plain HTTP backends. Returns when it serves.

    It asks its workers once, too soon, and again after half a minute.
    """
    if not SMG.is_file():
        raise ClusterError("no .venv-smg here; use make bench")
    take_port = FreePorts().take
    http_port = take_port()
    deployment = Deployment(engine="sim", model=model, model_name=_MODEL_NAME, http_port=http_port)
    return _started(SMG_NAME, cluster, smg_processes(deployment, step_ms, take_port), deployment)


def smg_processes(
    deployment: Deployment, step_ms: float, take_port: Callable[[], int]
) -> list[ProcessSpec]:
    """The backends and the gateway."""
    backends = [
        _backend(number, take_port(), deployment.model_name, step_ms) for number in range(WORKERS)
    ]
    command = [str(SMG), "launch", "--host", HOST, "--port", str(deployment.http_port)]
    command += ["--worker-urls", *(backend.address for backend in backends)]
    command += ["--prometheus-host", HOST, "--prometheus-port", str(take_port())]
    command += ["--log-level", "error"]
    url = topology.http_url(deployment)
    models = Probe(kind="http", target=f"{url}/v1/models", contains=deployment.model_name)
    gateway = ProcessSpec(
        name="gateway-0",
        command=tuple(command),
        environment={"PYTHONPATH": ""},  # Its environment has none of our packages.
        ports={"http": deployment.http_port},
        address=url,
        probes=(models,),
        stage=topology.FRONTENDS_STAGE,
    )
    return [*backends, gateway]


def _backend(number: int, port: int, model_name: str, step_ms: float) -> ProcessSpec:
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "benchmarks.serving.backend", "--port", str(port)]
    command += ["--model", model_name, "--step-ms", str(step_ms)]
    return ProcessSpec(
        name=f"backend-{number}",
        command=tuple(command),
        environment={"PYTHONPATH": str(REPOSITORY)},
        ports={"http": port},
        address=url,
        probes=(Probe(kind="http", target=f"{url}/health"),),
        stage=topology.WORKERS_STAGE,
    )


SWITCHGEAR, DYNAMO, DYNAMO_AS_SHIPPED, SMG_NAME = "switchgear", "dynamo", "dynamo as shipped", "smg"

START: dict[str, Callable[..., System]] = {
    SWITCHGEAR: start_switchgear,
    DYNAMO: start_dynamo,
    SMG_NAME: start_smg,
    DYNAMO_AS_SHIPPED: partial(start_dynamo, is_quiet=False),
    f"{SWITCHGEAR} 2+1": partial(start_switchgear, frontends=2),
    f"{SWITCHGEAR} 1+2": partial(start_switchgear, routers=2),
    f"{SWITCHGEAR} 2+2": partial(start_switchgear, frontends=2, routers=2),
}
"""By the name that a system has in results; 2+1 is with two frontends and one router."""

COMPARED = (SWITCHGEAR, DYNAMO, SMG_NAME)
"""Unless others are asked for."""


def make_model_folder(folder: Path, report: Callable[[str], None]) -> Path:
    """The default model's tokenizer, with a context long enough for the longest prompt.

    Neither engine computes anything, so neither needs weights; Dynamo takes the limit from here.
    """
    shutil.copytree(default_model.tokenizer_folder(report), folder, ignore=_weights)
    config = folder / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"max_position_embeddings": _CONTEXT_LENGTH_TOKENS}))
    return folder


def _weights(_: str, names: list[str]) -> list[str]:
    return [name for name in names if os.path.splitext(name)[1] == ".safetensors"]


def _started(
    name: str, cluster: LocalCluster, processes: list[ProcessSpec], deployment: Deployment
) -> System:
    cluster.start(processes)
    cluster.wait_ready(_READY_TIMEOUT_SECONDS)
    url = f"{topology.http_url(deployment)}/v1/chat/completions"
    return System(name, cluster, url, deployment.model_name)
