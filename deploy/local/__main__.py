"""Starts, shows and stops a whole deployment on this machine: `python -m deploy.local --help`."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer
from google.protobuf import struct_pb2
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from deploy.local import (
    certificates,
    default_model,
    etcd_accounts,
    explaining,
    live_config,
    progress,
    topology,
)
from deploy.local.ask_router import RouterAt
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.ports import FreePorts, is_free
from deploy.local.process import RunningProcess
from deploy.local.topology import Deployment, Engine
from libs.common.identity import CLIENT

_READY_TIMEOUT_SECONDS: dict[Engine, float] = {"sim": 60.0, "vllm": 600.0}
_WATCH_SECONDS = 0.5
_LOG_LINES = 100

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Settings that are changed while running.")
app.add_typer(config_app, name="config")
# Tables that go to a file or a pipe need not fit a screen.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)

RunDir = Annotated[Path, typer.Option(help="Where pid files, logs and data are.")]
DEFAULT_RUN_DIR = topology.REPOSITORY / ".run"


class Interrupted(Exception):
    """A person or the system asked the launcher to end."""


@app.command()
def up(
    engine: Annotated[Literal["vllm", "sim"], typer.Option()] = "vllm",
    model: Annotated[str, typer.Option(help="A Hugging Face folder.")] = "",
    dtype: str = "bfloat16",
    prefill: Annotated[int, typer.Option(min=0)] = 1,
    decode: Annotated[int, typer.Option(min=1)] = 1,
    embed: Annotated[int, typer.Option(min=0, help="Workers that embed.")] = 0,
    embed_model: Annotated[str, typer.Option(help="Their folder; the same without.")] = "",
    frontends: Annotated[int, typer.Option(min=1)] = 1,
    routers: Annotated[int, typer.Option(min=1)] = 1,
    indexers: Annotated[int, typer.Option(min=0)] = 1,
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    envoy: Annotated[bool, typer.Option("--envoy", help="Put Envoy in front.")] = False,
    kv_cache_bytes: Annotated[int, typer.Option(min=0, help="For each vLLM worker.")] = 0,
    max_model_len: Annotated[int, typer.Option(min=0, help="In tokens.")] = 0,
    sim_step_ms: Annotated[
        float | None, typer.Option(help="Simulated engines take that long for every step.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Certificates and passwords for all.")] = False,
    detach: Annotated[bool, typer.Option(help="Return when everything is ready.")] = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Start a deployment, wait until it serves, and keep it until Ctrl-C (or `down`)."""
    cluster = LocalCluster(run_dir)
    cluster.refuse_if_running()
    if not is_free(http_port):
        raise ClusterError(f"port {http_port} is in use; choose another (make up HTTP_PORT=...)")
    folder, model_name = _model(engine, model)
    embed_folder, embed_name = _model(engine, embed_model) if embed_model else (folder, model_name)
    deployment = Deployment(
        engine=engine,
        model=folder,
        model_name=model_name,
        dtype=dtype,
        prefill=prefill,
        decode=decode,
        embed=embed,
        embed_model=embed_folder,
        embed_model_name=embed_name if embed_name != model_name else "",
        frontends=frontends,
        routers=routers,
        indexers=indexers,
        http_port=http_port,
        envoy=envoy,
        gpus=_gpus(),
        kv_cache_bytes=kv_cache_bytes,
        max_model_len_tokens=max_model_len,
        sim_step_ms=sim_step_ms,
        tls=tls,
    )
    stop_requested = _stop_requests()
    secured = topology.certificates_folder(run_dir)
    if tls:
        _make_certificates(secured)
    cluster.start(topology.processes(deployment, run_dir, FreePorts().take))
    with ExitStack() as stack:
        # However this ends, even by a print to a terminal that is gone, nothing is left running.
        stack.enter_context(cluster)
        try:
            if tls:
                etcd_accounts.require_passwords(cluster.process("etcd-0").spec.address, secured)
            _show_start(cluster, _READY_TIMEOUT_SECONDS[engine], stop_requested)
            _show_usage(deployment, cluster)
            if detach:
                stack.pop_all()
                return
            _watch(cluster, stop_requested)
        except Interrupted:
            pass
        console.print("stopping")
    console.print("stopped")


@app.command()
def down(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Stop everything. Fine to repeat."""
    LocalCluster(run_dir).stop()
    console.print("stopped")


@app.command()
def status(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Show every process with its pid, address, ports and health."""
    processes = LocalCluster(run_dir).processes()
    if not processes:
        console.print("nothing is running (make up starts it)")
        return
    table = Table("service", "pid", "up", box=None, header_style="bold")
    table.add_column("address", no_wrap=True, overflow="ignore")
    table.add_column("gRPC port")
    table.add_column("metrics port")
    table.add_column("health")
    with ThreadPoolExecutor(len(processes)) as pool:
        for process, health in zip(processes, pool.map(_health, processes), strict=True):
            pid, up_time = (str(process.pid), _age(process)) if process.is_alive() else ("-", "-")
            ports = (str(process.spec.ports.get(kind, "-")) for kind in ("grpc", "metrics"))
            table.add_row(process.name, pid, up_time, process.spec.address, *ports, health)
    console.print(table)


@app.command()
def logs(
    service: Annotated[str, typer.Argument(help="Such as router-0; all of them without.")] = "",
    follow: bool = False,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show the end of a process's log, or of all."""
    cluster = LocalCluster(run_dir)
    found = sorted(path.stem for path in cluster.run_dir.glob("*.log"))
    chosen = [name for name in found if service in ("", name)]
    if not chosen:
        raise ClusterError(f"no log of {service!r} here, only: {', '.join(found) or 'none'}")
    command = ["tail", "-n", str(_LOG_LINES), *(["-F"] if follow else [])]
    os.execvp("tail", [*command, *(str(cluster.log_path(name)) for name in chosen)])


@app.command()
def restart(service: str, run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Start one process again, dead or alive, exactly as it was started."""
    with progress.told(_print_whole, lambda: f"waiting for {service}"):
        process = LocalCluster(run_dir).restart(service, max(_READY_TIMEOUT_SECONDS.values()))
    console.print(f"{process.name} runs as {process.pid}")


@app.command()
def verify(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Compare the KV indexers with what the workers hold; fails when they differ."""
    cluster = LocalCluster(run_dir)
    etcd_url, indexer = cluster.process("etcd-0").spec.address, cluster.process("kv_indexer-0").spec
    flags = ["--etcd-url", etcd_url, "--namespace", topology.NAMESPACE]
    command = [sys.executable, "-m", "services.kv_indexer", "verify", *flags]
    os.execve(sys.executable, command, os.environ | indexer.environment)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="Such as chatcmpl-...; any without.")] = "",
    last: Annotated[int, typer.Option(min=1, help="How many decisions, newest last.")] = 1,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show why requests went where they went: candidates, costs, winners."""
    found = explaining.last_decisions(_routers(run_dir), request_id, last)
    if not found.decisions:
        raise ClusterError(
            f"no router remembers {request_id!r}" if request_id else "nothing was decided yet"
        )
    for router, explanation in found.decisions:
        _print_trimmed(explaining.shown(router, explanation))
    for router, degradation in found.degradations:
        lack = explaining.lack_in_words(degradation)
        console.print(f"[yellow]{router} is degraded:[/] {lack}", soft_wrap=True)


def _print_trimmed(part: RenderableType) -> None:
    """Without the spaces that fill tables up, which are in the way of who reads a pipe."""
    with console.capture() as captured:
        console.print(part, soft_wrap=True)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), file=console.file)


@config_app.command("list")
def list_config(run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Show the live settings that each router goes by."""
    for router, settings in live_config.settings_of(_routers(run_dir)):
        console.print(live_config.shown(router, settings))


@config_app.command("set")
def set_config(
    component: live_config.Component,
    key: str,
    value: Annotated[str, typer.Argument(help="JSON; what is none is taken as a text.")],
    model: Annotated[str, typer.Option(help="Only for this model.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Change a setting of all running processes of a component, now and for later ones."""
    _change_config(run_dir, component, key, model, live_config.parsed(value))


@config_app.command("unset")
def unset_config(
    component: live_config.Component,
    key: str,
    model: Annotated[str, typer.Option(help="Only for this model.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Let a setting be again what it was when each process started."""
    _change_config(run_dir, component, key, model, None)


@app.command("certificates")
def make_certificates(
    folder: Annotated[Path, typer.Argument(help="Where they are to be.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name or address of frontend, Envoy, etcd and NATS; repeatable."
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long they are good.")] = (
        certificates.CERTIFICATE_DAYS
    ),
) -> None:
    """Make a development CA and what it signs; new certificates where the CA is there already."""
    _make_certificates(folder, host or [], days)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"in {folder}: {names}", soft_wrap=True)


def _make_certificates(
    folder: Path, hosts: Sequence[str] = (), days: int = certificates.CERTIFICATE_DAYS
) -> None:
    try:
        certificates.make(folder, hosts, days)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no certificates in {folder}: {error}") from error


def _change_config(
    run_dir: Path,
    component: live_config.Component,
    key: str,
    model: str,
    value: struct_pb2.Value | None,
) -> None:
    etcd_url = LocalCluster(run_dir).process("etcd-0").spec.address
    secured = topology.certificates_folder(run_dir)
    access = certificates.access_to("etcd", secured) if etcd_url.startswith("https:") else None
    full_key = live_config.full_key(component, key, model)
    revision = live_config.write(etcd_url, full_key, value, access)
    problems = live_config.wait_followed(_routers(run_dir), full_key, revision)
    if problems:
        undo = f"python -m deploy.local config unset {component} {key}" + (
            f" --model {model}" if model else ""
        )
        kept = "" if value is None else f". It is in etcd nonetheless; to remove it: {undo}"
        raise ClusterError("; ".join(problems) + kept)
    console.print(f"in force on all routers, revision {revision}" if revision else "was not set")


def _routers(run_dir: Path) -> dict[str, RouterAt]:
    """The living routers, by name."""
    cluster = LocalCluster(run_dir)
    secured = None
    if any(process.spec.address.startswith("https:") for process in cluster.processes()):
        secured = certificates.files_of(topology.certificates_folder(run_dir), CLIENT)
    found = {
        process.name: RouterAt(process.spec.address, secured)
        for process in cluster.processes()
        if process.name.startswith("router-") and process.is_alive()
    }
    if not found:
        raise ClusterError("no router is running (make up starts everything)")
    return found


@app.command("model")
def make_model() -> None:
    """Make the default model, if it is not there, and print its folder."""
    print(default_model.model_folder(report=lambda line: print(line, file=sys.stderr)))


def _model(engine: Engine, model: str) -> tuple[Path, str]:
    if model:
        folder = Path(model).absolute()
        if not (folder / "config.json").is_file():
            raise ClusterError(f"MODEL={model} is not a Hugging Face folder: it has no config.json")
        return folder, folder.name
    make = default_model.tokenizer_folder if engine == "sim" else default_model.model_folder
    try:
        return make(console.print), default_model.NAME
    except subprocess.SubprocessError as error:
        raise ClusterError(
            f"cannot download the default model ({error}); name a folder with MODEL=..."
        ) from error
    except OSError as error:
        raise ClusterError(
            f"can't keep the default model in {default_model.models_cache()} ({error}); "
            "set SWITCHGEAR_CACHE to a folder that can be written to"
        ) from error


def _gpus() -> int:
    """How many there are. The same question decides which vLLM is installed."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "-L"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _stop_requests() -> threading.Event:
    """Set by SIGINT, SIGTERM and SIGHUP. They interrupt nothing: it is looked at where safe."""
    requested = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: requested.set())
    return requested


def _show_start(
    cluster: LocalCluster, timeout_seconds: float, stop_requested: threading.Event
) -> None:
    """Waits until everything is ready, with one line for each process.

    Without a terminal nothing can be repainted: each process has its line when it is ready, and
    those that are not have one together every so often.
    """
    started_at = time.monotonic()
    ready_after: dict[str, float] = {}
    names = [process.name for process in cluster.processes()]

    def table() -> Table:
        rows = Table(box=None, show_header=False)
        for name in names:
            if name in ready_after:
                rows.add_row(name, "[green]ready[/]", f"{ready_after[name]:.1f} s")
            else:
                rows.add_row(name, "starting", f"{time.monotonic() - started_at:.1f} s")
        return rows

    def report(ready: set[str]) -> None:
        if stop_requested.is_set():
            raise Interrupted
        for name in sorted(ready - ready_after.keys()):
            ready_after[name] = time.monotonic() - started_at
            if not console.is_terminal:
                console.print(f"{name} ready after {ready_after[name]:.1f} s")
        if console.is_terminal:
            live.update(table(), refresh=True)

    def still_starting() -> str:
        return f"waiting for {', '.join(name for name in names if name not in ready_after)}"

    live = Live(console=console, auto_refresh=False)
    with live if console.is_terminal else progress.told(_print_whole, still_starting):
        cluster.wait_ready(timeout_seconds, report)


def _print_whole(line: str) -> None:
    console.print(line, soft_wrap=True)


def _show_usage(deployment: Deployment, cluster: LocalCluster) -> None:
    url = topology.http_url(deployment)
    body = (
        f'{{"model": "{deployment.model_name}", "stream": true, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    )
    console.print(f"\n{deployment.model_name} is served at [bold]{url}[/]\n", soft_wrap=True)
    console.print(
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n",
        markup=False,
        soft_wrap=True,
    )
    if deployment.embed:
        body = f'{{"model": "{deployment.embedding_model}", "input": "What is a dynamo?"}}'
        console.print(
            f"  curl {url}/v1/embeddings -H 'Content-Type: application/json' -d '{body}'\n",
            markup=False,
            soft_wrap=True,
        )
    for process in cluster.processes():
        if process.name.startswith("frontend-"):
            port = process.spec.ports["grpc"]
            console.print(f"{process.name} serves gRPC at {topology.HOST}:{port}", soft_wrap=True)
    if deployment.envoy:
        console.print(f"envoy-0 serves gRPC, too, at {topology.HOST}:{deployment.http_port}")
    console.print(f"logs: {cluster.run_dir}/*.log   make status | logs | restart | down")


def _watch(cluster: LocalCluster, stop_requested: threading.Event) -> None:
    """Returns when asked to stop or when another command has stopped everything."""
    console.print("Ctrl-C stops everything")
    missing: set[str] = set()
    noted: set[str] = set()
    while not stop_requested.wait(_WATCH_SECONDS):
        processes = cluster.processes()
        if not processes:
            return
        alive = {process.name for process in processes if process.is_alive()}
        dead = {process.name for process in processes} - alive
        # Dead at two looks in a row: one look may fall into a restart.
        for name in sorted((dead & missing) - noted):
            console.print(f"{name} died; the rest goes on (make restart SERVICE={name})")
        for name in sorted(noted & alive):
            console.print(f"{name} runs again")
        noted = dead & missing
        missing = dead


def _health(process: RunningProcess) -> str:
    if not process.is_alive():
        return "[red]dead[/]"
    failure = process.spec.failure()
    return "[green]ready[/]" if failure is None else f"[yellow]{failure}[/]"


def _age(process: RunningProcess) -> str:
    seconds = int(time.time() - psutil.Process(process.pid).create_time())
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def main() -> None:
    try:
        app()
    except ClusterError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
