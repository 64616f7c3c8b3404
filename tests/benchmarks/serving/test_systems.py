"""That the two systems are set alike."""

from itertools import count
from pathlib import Path

from benchmarks.serving import systems
from deploy.local import topology
from deploy.local.process import ProcessSpec
from deploy.local.topology import Deployment


def dynamo() -> dict[str, ProcessSpec]:
    take_port = count(10_000).__next__
    deployment = Deployment(engine="sim", model=Path("/m"), model_name="m", http_port=8000)
    made = systems.dynamo_processes(
        deployment,
        topology.etcd_server(Path("/run"), take_port),
        topology.nats_server(Path("/run"), take_port),
        Path("/run/mocker.args"),
        Path("/run"),
    )
    return {spec.name: spec for spec in made}


def test_dynamo_routes_by_kv_and_waits_for_all_workers() -> None:
    command = dynamo()["frontend-0"].command
    assert command[command.index("--router-mode") + 1] == "kv"
    assert command[command.index("--router-min-initial-workers") + 1] == "4"


def test_dynamo_is_told_its_servers() -> None:
    for spec in dynamo().values():
        assert spec.environment["ETCD_ENDPOINTS"].startswith("http://127.0.0.1:")
        assert spec.environment["NATS_SERVER"].startswith("nats://127.0.0.1:")


def test_the_mocker_has_the_simulators_limits_and_steps() -> None:
    arguments = systems.mocker_arguments(6.0)
    engine = arguments["engine"]
    assert isinstance(engine, dict)
    assert engine["timing_model"] == {"type": "fixed", "prefill_ms": 0.0, "decode_ms": 6.0}
    assert engine["num_gpu_blocks"] * engine["block_size"] == systems.KV_TOKENS
