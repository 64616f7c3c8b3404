"""Processes are started, watched, restarted and stopped, and none is left behind."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.local import topology
from deploy.local.cluster import ClusterError, LocalCluster, ProcessDied
from deploy.local.ports import FreePorts
from deploy.local.probe import Probe
from deploy.local.process import ProcessSpec, RunningProcess

TIMEOUT_SECONDS = 20.0

# Greets like NATS, and when told to stop adds its name to a file.
GREETER = """
import signal, socketserver, sys
port, name, stopped = sys.argv[1:]
class Greeting(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"INFO")
def stop(*_):
    with open(stopped, "a") as file:
        file.write(name + " ")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
socketserver.TCPServer.allow_reuse_address = True
print("listening on", port, flush=True)
socketserver.TCPServer(("127.0.0.1", int(port)), Greeting).serve_forever()
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "run") as cluster:
        yield cluster


@pytest.fixture
def greeter(tmp_path: Path) -> Callable[..., ProcessSpec]:
    ports = FreePorts()

    def make(name: str, stage: int = 0) -> ProcessSpec:
        port = ports.take()
        return ProcessSpec(
            name=name,
            command=(sys.executable, "-c", GREETER, str(port), name, str(tmp_path / "stopped")),
            ports={"tcp": port},
            probes=(Probe(kind="nats", target=f"127.0.0.1:{port}"),),
            stage=stage,
        )

    return make


def shell(name: str, script: str, probes: tuple[Probe, ...] = ()) -> ProcessSpec:
    return ProcessSpec(name=name, command=("/bin/sh", "-c", script), probes=probes)


def wait_dead(process: RunningProcess) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(process.pid).wait(TIMEOUT_SECONDS)
    assert not process.is_alive()


def test_a_process_is_ready_when_its_probe_passes(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    cluster.start([greeter("a-0"), greeter("b-0")])
    seen: list[set[str]] = []
    cluster.wait_ready(TIMEOUT_SECONDS, seen.append)
    assert seen[-1] == {"a-0", "b-0"}
    assert all(process.spec.failure() is None for process in cluster.processes())


def test_the_run_folder_tells_pid_and_output(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    spec = greeter("a-0")
    cluster.start([spec])
    cluster.wait_ready(TIMEOUT_SECONDS)
    assert (cluster.run_dir / "a-0.pid").read_text() == f"{cluster.process('a-0').pid}\n"
    assert cluster.log_tail("a-0") == f"listening on {spec.ports['tcp']}"


def test_a_process_that_dies_while_starting_is_reported_with_the_end_of_its_log(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    cluster.start([greeter("a-0"), shell("b-0", "echo cannot find my model >&2; exit 3")])
    with pytest.raises(ProcessDied, match=r"b-0 died while starting(.|\n)*cannot find my model"):
        cluster.wait_ready(TIMEOUT_SECONDS)


def test_a_process_that_does_not_become_ready_is_reported_with_the_reason(
    cluster: LocalCluster,
) -> None:
    nobody = Probe(kind="nats", target=f"127.0.0.1:{FreePorts().take()}")
    cluster.start([shell("a-0", "sleep 60", (nobody,))])
    with pytest.raises(ClusterError, match="a-0: NATS: Connection refused"):
        cluster.wait_ready(0.0)


def test_a_command_that_does_not_exist_stops_what_was_started_before_it(
    cluster: LocalCluster,
) -> None:
    missing = ProcessSpec(name="b-0", command=("/nonexistent/program",))
    with pytest.raises(ClusterError, match="cannot start b-0"):
        cluster.start([shell("a-0", "sleep 60"), missing])
    assert cluster.processes() == []


def test_a_killed_process_stays_dead_and_the_rest_goes_on(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    cluster.start([greeter("a-0"), greeter("b-0")])
    cluster.wait_ready(TIMEOUT_SECONDS)
    killed = cluster.process("a-0")
    cluster.kill("a-0")
    wait_dead(killed)
    assert [process.is_alive() for process in cluster.processes()] == [False, True]


def test_a_restarted_process_is_a_new_one_with_the_same_command_and_log(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    spec = greeter("a-0")
    cluster.start([spec])
    cluster.wait_ready(TIMEOUT_SECONDS)
    old = cluster.process("a-0")
    cluster.kill("a-0")
    wait_dead(old)
    new = cluster.restart("a-0", TIMEOUT_SECONDS)
    assert (new.pid != old.pid, new.is_alive(), new.spec) == (True, True, spec)
    assert cluster.process("a-0") == new
    assert cluster.log_tail("a-0").count("listening on") == 2


def test_a_living_process_is_stopped_before_it_is_started_again(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    cluster.start([greeter("a-0")])
    cluster.wait_ready(TIMEOUT_SECONDS)
    old = cluster.process("a-0")
    cluster.restart("a-0", TIMEOUT_SECONDS)
    assert not old.is_alive()


def test_restarting_an_unknown_process_names_the_known_ones(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec]
) -> None:
    cluster.start([greeter("a-0")])
    with pytest.raises(ClusterError, match="no process 'router-7' here, only: a-0"):
        cluster.restart("router-7", TIMEOUT_SECONDS)


def test_stages_stop_from_the_last_to_the_first(
    cluster: LocalCluster, greeter: Callable[..., ProcessSpec], tmp_path: Path
) -> None:
    cluster.start([greeter("b-0", stage=1), greeter("c-0", stage=2), greeter("a-0", stage=0)])
    cluster.wait_ready(TIMEOUT_SECONDS)
    cluster.stop()
    assert (tmp_path / "stopped").read_text().split() == ["c-0", "b-0", "a-0"]


def test_stopping_kills_what_ignores_the_request_and_the_children_of_the_dead(
    cluster: LocalCluster,
) -> None:
    cluster.start(
        [
            shell("deaf-0", "trap '' TERM; sleep 61 & wait"),
            shell("orphaned-0", "sleep 62 & exit"),
        ]
    )
    sessions = {process.pid for process in cluster.processes()}
    cluster.stop(grace_seconds=0.2)
    left = [pid for pid in psutil.pids() if session_of(pid) in sessions]
    assert [pid for pid in left if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE] == []
    assert not list(cluster.run_dir.glob("*.pid"))


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_stopping_twice_is_fine(cluster: LocalCluster) -> None:
    cluster.start([shell("a-0", "sleep 60")])
    cluster.stop()
    cluster.stop()
    assert cluster.processes() == []


def test_a_stopped_process_still_ends(cluster: LocalCluster) -> None:
    cluster.start([shell("a-0", "sleep 60")])
    process = cluster.process("a-0")
    cluster.kill("a-0", signal.SIGSTOP)
    cluster.stop(grace_seconds=0.0)
    assert not process.is_alive()


def test_another_command_can_stop_what_this_one_started(cluster: LocalCluster) -> None:
    cluster.start([shell("a-0", "sleep 60")])
    process = cluster.process("a-0")
    LocalCluster(cluster.run_dir).stop()
    assert (process.is_alive(), cluster.processes()) == (False, [])


def test_a_second_start_is_refused_while_anything_runs(cluster: LocalCluster) -> None:
    cluster.start([shell("a-0", "sleep 60")])
    with pytest.raises(ClusterError, match="already running"):
        LocalCluster(cluster.run_dir).start([shell("b-0", "sleep 60")])
    assert [process.name for process in cluster.processes()] == ["a-0"]


def test_files_left_by_a_crash_do_not_hinder_a_start(cluster: LocalCluster) -> None:
    cluster.start([shell("a-0", "exit")])
    wait_dead(cluster.process("a-0"))
    cluster.start([shell("b-0", "sleep 60")])
    assert [process.name for process in cluster.processes()] == ["b-0"]


def test_a_start_keeps_the_logs_of_the_run_before_and_none_older(cluster: LocalCluster) -> None:
    for said in ("first", "second", "third"):
        cluster.start([shell("a-0", f"echo {said}")])
        wait_dead(cluster.process("a-0"))
    assert cluster.log_path("a-0").read_text() == "third\n"
    assert (cluster.run_dir / "a-0.log.1").read_text() == "second\n"
    cluster.start([shell("b-0", "exit")])
    wait_dead(cluster.process("b-0"))
    kept = sorted(path.name for path in cluster.run_dir.glob("*.log*"))
    assert kept == ["a-0.log.1", "b-0.log"]


def test_a_process_that_took_over_a_recorded_pid_is_let_live(cluster: LocalCluster) -> None:
    cluster.start([shell("innocent-0", "sleep 60")])
    innocent = cluster.process("innocent-0")
    stale = innocent.model_copy(update={"created_at_seconds": innocent.created_at_seconds - 3600.0})
    assert (stale.is_alive(), stale.session()) == (False, [])
    stale.kill_session()
    stale.send(signal.SIGKILL)
    assert innocent.is_alive()


def test_real_etcd_and_nats_become_ready_and_keep_their_ports_over_a_restart(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    deployment = topology.Deployment(
        engine="sim", model=tmp_path, model_name="none", http_port=FreePorts().take()
    )
    everything = topology.processes(deployment, cluster.run_dir, FreePorts().take)
    cluster.start([spec for spec in everything if spec.name in ("etcd-0", "nats-0")])
    cluster.wait_ready(TIMEOUT_SECONDS)
    etcd = cluster.process("etcd-0")
    cluster.kill("etcd-0")
    wait_dead(etcd)
    assert cluster.restart("etcd-0", TIMEOUT_SECONDS).spec.address == etcd.spec.address
