"""`python -m deploy.local`, with stand-ins for the services."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from deploy.local import __main__ as command_line
from deploy.local import explaining, live_config, topology
from deploy.local.cluster import ClusterError, LocalCluster
from deploy.local.ports import FreePorts
from deploy.local.probe import Probe
from deploy.local.process import ProcessSpec
from switchgear.router.v1 import router_pb2

TIMEOUT_SECONDS = 20.0

# The launcher as it is, but for which processes make up a deployment.
LAUNCHER = """
import json, sys
from deploy.local import __main__ as command_line, progress, topology
from deploy.local.process import ProcessSpec
progress.PERIOD_SECONDS = 0.1
stand_ins = [ProcessSpec.model_validate(spec) for spec in json.loads(sys.argv.pop(1))]
topology.processes = lambda *_: stand_ins
command_line.main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "run") as cluster:
        yield cluster


def sleeper(name: str) -> ProcessSpec:
    return ProcessSpec(name=name, command=("/bin/sleep", "60"))


def up_flags(model: Path, cluster: LocalCluster) -> list[str]:
    flags = ["up", "--engine", "sim", "--model", str(model), "--run-dir", str(cluster.run_dir)]
    return [*flags, "--http-port", str(FreePorts().take())]


@contextmanager
def launcher(stand_ins: list[ProcessSpec], flags: list[str]) -> Iterator["subprocess.Popen[str]"]:
    specs = json.dumps([spec.model_dump() for spec in stand_ins])
    command = [sys.executable, "-c", LAUNCHER, specs, *flags]
    with subprocess.Popen(
        command,
        cwd=topology.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"the launcher ended without saying {text!r}")


@pytest.mark.parametrize("signal_number", [2, 15, 1], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launcher_stops_everything(
    model: Path, cluster: LocalCluster, signal_number: int
) -> None:
    with launcher([sleeper("a-0")], up_flags(model, cluster)) as process:
        read_until(process, "Ctrl-C stops everything")
        [started] = cluster.processes()
        process.send_signal(signal_number)
        assert process.wait(TIMEOUT_SECONDS) == 0
    assert (started.is_alive(), cluster.processes()) == (False, [])


def test_a_launcher_that_can_no_longer_print_still_stops_everything(
    model: Path, cluster: LocalCluster
) -> None:
    with launcher([sleeper("a-0")], up_flags(model, cluster)) as process:
        read_until(process, "Ctrl-C stops everything")
        [started] = cluster.processes()
        assert process.stdout is not None
        process.stdout.close()
        process.terminate()
        process.wait(TIMEOUT_SECONDS)
    assert (started.is_alive(), cluster.processes()) == (False, [])


def test_the_launcher_says_which_process_died_and_keeps_the_rest(
    model: Path, cluster: LocalCluster
) -> None:
    with launcher([sleeper("a-0"), sleeper("b-0")], up_flags(model, cluster)) as process:
        read_until(process, "Ctrl-C stops everything")
        cluster.kill("b-0")
        assert "make restart SERVICE=b-0" in read_until(process, "died")
        assert [left.name for left in cluster.processes() if left.is_alive()] == ["a-0"]


def test_the_launcher_ends_when_another_command_stops_everything(
    model: Path, cluster: LocalCluster
) -> None:
    with launcher([sleeper("a-0")], up_flags(model, cluster)) as process:
        read_until(process, "Ctrl-C stops everything")
        cluster.stop()
        assert process.wait(TIMEOUT_SECONDS) == 0


def test_a_detached_deployment_outlives_its_launcher(model: Path, cluster: LocalCluster) -> None:
    with launcher([sleeper("a-0")], [*up_flags(model, cluster), "--detach"]) as process:
        read_until(process, "curl -N http")
        assert process.wait(TIMEOUT_SECONDS) == 0
    assert [left.is_alive() for left in cluster.processes()] == [True]


def test_a_process_that_dies_while_starting_fails_the_command_and_stops_the_rest(
    model: Path, cluster: LocalCluster
) -> None:
    never = Probe(kind="nats", target=f"127.0.0.1:{FreePorts().take()}")
    failing = ProcessSpec(
        name="b-0", command=("/bin/sh", "-c", "echo out of memory; exit 1"), probes=(never,)
    )
    with launcher([sleeper("a-0"), failing], up_flags(model, cluster)) as process:
        read_until(process, "b-0 died while starting")
        read_until(process, "out of memory")
        assert process.wait(TIMEOUT_SECONDS) == 1
    assert cluster.processes() == []


def test_without_a_terminal_it_is_said_again_and_again_who_is_waited_for(
    model: Path, cluster: LocalCluster
) -> None:
    never = Probe(kind="nats", target=f"127.0.0.1:{FreePorts().take()}")
    loading = ProcessSpec(name="b-0", command=("/bin/sleep", "60"), probes=(never,))
    with launcher([sleeper("a-0"), loading], up_flags(model, cluster)) as process:
        read_until(process, "a-0 ready")
        for _ in range(2):
            assert "waiting for b-0 (" in read_until(process, "waiting for")
        process.terminate()
        assert process.wait(TIMEOUT_SECONDS) == 0


def test_a_taken_http_port_is_refused_before_anything_starts(
    model: Path, cluster: LocalCluster
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = CliRunner().invoke(
            command_line.app, [*up_flags(model, cluster), "--http-port", str(port)]
        )
    assert isinstance(result.exception, ClusterError)
    assert f"port {port} is in use" in str(result.exception)
    assert cluster.processes() == []


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_there_cant_be_is_refused(
    model: Path, cluster: LocalCluster, port: str
) -> None:
    result = CliRunner().invoke(command_line.app, [*up_flags(model, cluster), "--http-port", port])
    assert result.exit_code == 2
    assert "--http-port" in result.output


def test_a_cache_that_cant_be_made_is_named(
    tmp_path: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHGEAR_CACHE", str(tmp_path / "file"))
    flags = ["up", "--engine", "sim", "--run-dir", str(cluster.run_dir)]
    result = CliRunner().invoke(command_line.app, [*flags, "--http-port", str(FreePorts().take())])
    assert isinstance(result.exception, ClusterError)
    assert f"can't keep the default model in {tmp_path}/file/models" in str(result.exception)
    assert "set SWITCHGEAR_CACHE" in str(result.exception)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, cluster: LocalCluster) -> None:
    result = CliRunner().invoke(command_line.app, up_flags(tmp_path, cluster))
    assert "is not a Hugging Face folder" in str(result.exception)


def test_status_shows_the_living_and_the_dead(model: Path, cluster: LocalCluster) -> None:
    flags = [*up_flags(model, cluster), "--detach"]
    with launcher([sleeper("a-0"), sleeper("b-0")], flags) as process:
        assert process.wait(TIMEOUT_SECONDS) == 0
    cluster.kill("b-0")
    flags = ["status", "--run-dir", str(cluster.run_dir)]
    lines = CliRunner().invoke(command_line.app, flags).output.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [
        ("a-0", "ready"),
        ("b-0", "dead"),
    ]


def test_the_ports_of_grpc_and_metrics_are_shown(model: Path, cluster: LocalCluster) -> None:
    frontend = sleeper("frontend-0").model_copy(update={"ports": {"grpc": 4711, "metrics": 4712}})
    with launcher([sleeper("a-0"), frontend], [*up_flags(model, cluster), "--detach"]) as process:
        assert "127.0.0.1:4711" in read_until(process, "frontend-0 serves gRPC at")
        assert process.wait(TIMEOUT_SECONDS) == 0
    flags = ["status", "--run-dir", str(cluster.run_dir)]
    lines = CliRunner().invoke(command_line.app, flags).output.splitlines()
    shown = {line.split()[0]: line.split()[-3:-1] for line in lines[1:]}
    assert shown == {"a-0": ["-", "-"], "frontend-0": ["4711", "4712"]}


def test_an_explanation_in_a_pipe_has_no_spaces_at_the_ends_of_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    explanation = router_pb2.Explanation(request_id="chatcmpl-1", prompt_tokens=5)
    for name in ("worker-0", "worker-with-a-long-name-0"):
        candidate = explanation.decode.candidates.add(cost=1)
        candidate.worker.name = name
    found = explaining.Decisions(decisions=[("router-0", explanation)])
    monkeypatch.setattr(command_line, "_routers", lambda _: {})
    monkeypatch.setattr(explaining, "last_decisions", lambda *_: found)
    lines = CliRunner().invoke(command_line.app, ["explain"]).output.splitlines()
    assert any("worker-with-a-long-name-0" in line for line in lines)
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_setting_that_routers_reject_is_told_with_how_to_remove_it(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.start([sleeper("etcd-0").model_copy(update={"address": "http://127.0.0.1:1"})])
    monkeypatch.setattr(command_line, "_routers", lambda _: {})
    monkeypatch.setattr(live_config, "write", lambda *_: 7)
    monkeypatch.setattr(live_config, "wait_followed", lambda *_: ["router-0 rejects 1: unknown"])
    flags = ["config", "set", "router", "temprature", "1", "--run-dir", str(cluster.run_dir)]
    told = str(CliRunner().invoke(command_line.app, [*flags, "--model", "m"]).exception)
    assert told.startswith("router-0 rejects 1: unknown.")
    assert told.endswith("python -m deploy.local config unset router temprature --model m")


def test_certificates_are_made_for_the_hosts_that_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    flags = ["certificates", str(folder), "--host", "etcd.example", "--host", "10.0.0.7"]
    result = CliRunner().invoke(command_line.app, flags)
    assert result.exit_code == 0, result.output
    assert "etcd.password" in result.output
    certificate = x509.load_pem_x509_certificate((folder / "etcd.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "etcd.example" in names.get_values_for_type(x509.DNSName)
    assert "10.0.0.7" in map(str, names.get_values_for_type(x509.IPAddress))


def test_a_folder_that_certificates_cant_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(command_line.app, ["certificates", str(tmp_path / "file")])
    assert isinstance(result.exception, ClusterError)
    assert f"no certificates in {tmp_path}/file" in str(result.exception)
