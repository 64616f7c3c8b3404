"""Which processes a deployment has, and what they are told."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from deploy.local import topology
from deploy.local.process import ProcessSpec
from deploy.local.topology import Deployment
from libs.common.identity import certificate_name


def specs(**choices: Any) -> dict[str, ProcessSpec]:
    deployment = Deployment.model_validate(
        {"engine": "sim", "model": "/models/m", "model_name": "m", "http_port": 8000} | choices
    )
    made = topology.processes(deployment, Path("/run"), count(10_000).__next__)
    return {spec.name: spec for spec in made}


def flag(spec: ProcessSpec, name: str) -> str:
    return spec.command[spec.command.index(name) + 1]


def test_one_of_everything_by_default() -> None:
    assert list(specs()) == [
        "etcd-0",
        "nats-0",
        "prefill_worker-0",
        "decode_worker-0",
        "kv_indexer-0",
        "router-0",
        "frontend-0",
    ]


def test_without_prefill_workers_the_decode_workers_are_alone() -> None:
    names = specs(prefill=0, decode=2)
    assert [name for name in names if "worker" in name] == ["decode_worker-0", "decode_worker-1"]


def test_workers_that_embed_are_beside_the_others_under_a_name_of_their_own() -> None:
    made = specs(decode=2, embed=1)
    workers = [made[f"decode_worker-{number}"] for number in range(3)]
    assert [flag(spec, "--served-model-name") for spec in workers] == ["m", "m", "m-embed"]
    assert [flag(spec, "--task") for spec in workers if "--task" in spec.command] == ["embed"]
    assert {flag(spec, "--model") for spec in workers} == {"/models/m"}
    other = specs(embed=1, embed_model="/models/e", embed_model_name="e")["decode_worker-1"]
    assert (flag(other, "--model"), flag(other, "--served-model-name")) == ("/models/e", "e")
    contained = [probe.contains for probe in made["frontend-0"].probes]
    assert contained[-2:] == ['"m"', '"m-embed"']


def test_every_service_has_grpc_and_metrics_at_ports_that_are_known_beforehand() -> None:
    made = specs(frontends=2)
    services = [spec for name, spec in made.items() if name not in ("etcd-0", "nats-0")]
    for spec in services:
        for kind in ("grpc", "metrics"):
            assert flag(spec, f"--{kind}-port") == str(spec.ports[kind])


def test_only_the_frontends_share_a_port() -> None:
    made = specs(prefill=2, decode=2, routers=2, indexers=2, frontends=3)
    ports = [port for spec in made.values() for kind, port in spec.ports.items() if kind != "http"]
    assert len(ports) == len(set(ports))
    assert {spec.ports["http"] for spec in made.values() if "http" in spec.ports} == {8000}


def test_envoy_has_the_port_and_knows_all_frontends_and_routers() -> None:
    made = specs(frontends=2, routers=2, envoy=True)
    envoy = made["envoy-0"]
    assert envoy.ports["http"] == 8000
    frontends = [made[name] for name in ("frontend-0", "frontend-1")]
    assert len({8000, *(spec.ports["http"] for spec in frontends)}) == 3
    for port in [spec.ports[kind] for spec in frontends for kind in ("http", "grpc")]:
        assert f'"port_value": {port}}}' in flag(envoy, "--config-yaml")
    for name in ("router-0", "router-1"):
        port = made[name].ports["grpc"]
        assert f'"port_value": {port}}}' in flag(envoy, "--config-yaml")


def test_envoy_outlives_the_frontends_so_that_it_can_say_that_they_are_gone() -> None:
    made = specs(envoy=True)
    assert made["router-0"].stage < made["envoy-0"].stage < made["frontend-0"].stage


def test_every_service_is_told_its_name_and_where_etcd_is() -> None:
    made = specs()
    services = [spec for name, spec in made.items() if name not in ("etcd-0", "nats-0")]
    for spec in services:
        assert flag(spec, "--name") == spec.name
        assert flag(spec, "--etcd-url") == made["etcd-0"].address


def test_who_has_a_use_for_nats_is_told_where_it_is() -> None:
    made = specs()
    for name in ("kv_indexer-0", "prefill_worker-0", "decode_worker-0", "frontend-0"):
        assert flag(made[name], "--nats-url") == made["nats-0"].address
    assert "--nats-url" not in made["router-0"].command


def test_nats_can_keep_responses() -> None:
    nats = specs()["nats-0"]
    assert "--jetstream" in nats.command
    assert flag(nats, "--store_dir").endswith("/nats-0.data")


def test_a_frontend_is_ready_when_it_lists_the_model() -> None:
    [health, page, models] = specs()["frontend-0"].probes
    assert health.kind == "grpc"
    assert page.target == "http://127.0.0.1:8000/health"
    assert (models.target, models.contains) == ("http://127.0.0.1:8000/v1/models", '"m"')


def test_a_frontend_that_asks_for_keys_is_ready_without_telling_what_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWITCHGEAR_FRONTEND_API_KEYS", "etcd")
    by_environment = specs()["frontend-0"]
    monkeypatch.delenv("SWITCHGEAR_FRONTEND_API_KEYS")
    by_flag = specs(flags={"frontend": ("--api-keys", "etcd")})["frontend-0"]
    for process in (by_environment, by_flag):
        assert not any(probe.target.endswith("/v1/models") for probe in process.probes)


def test_a_real_engine_runs_in_its_own_environment() -> None:
    made = specs(engine="vllm")
    assert ".venv-vllm" in made["decode_worker-0"].command[0]
    assert ".venv-vllm" not in made["router-0"].command[0]
    assert flag(made["decode_worker-0"], "--nixl-port") == str(
        made["decode_worker-0"].ports["nixl"]
    )


def test_real_engines_share_the_cores_only_without_a_gpu() -> None:
    assert "OMP_NUM_THREADS" in specs(engine="vllm")["decode_worker-0"].environment
    assert "OMP_NUM_THREADS" not in specs(engine="vllm", gpus=1)["decode_worker-0"].environment


def test_workers_are_spread_over_gpus_and_share_their_memory_fairly() -> None:
    made = specs(engine="vllm", gpus=2, prefill=1, decode=2)
    workers = [made[name] for name in ("prefill_worker-0", "decode_worker-0", "decode_worker-1")]
    assert [w.environment["CUDA_VISIBLE_DEVICES"] for w in workers] == ["0", "1", "0"]
    assert {flag(w, "--device-memory-fraction") for w in workers} == {"0.440"}
    assert "--kv-cache-bytes" not in made["decode_worker-0"].command


def test_what_a_person_says_of_memory_and_length_is_passed_on() -> None:
    made = specs(engine="vllm", kv_cache_bytes=2**30, max_model_len_tokens=4096)
    assert flag(made["decode_worker-0"], "--kv-cache-bytes") == str(2**30)
    assert flag(made["prefill_worker-0"], "--max-model-len-tokens") == "4096"


def test_simulated_engines_keep_their_own_timing_unless_a_step_is_given() -> None:
    assert "--sim-timing" not in specs()["decode_worker-0"].command
    worker = specs(sim_step_ms=6)["decode_worker-0"]
    assert (flag(worker, "--sim-timing"), flag(worker, "--sim-step-ms")) == ("fixed", "6.0")


def test_further_flags_reach_every_process_of_their_component() -> None:
    made = specs(routers=2, flags={"router": ("--temperature", "0.5")})
    assert [flag(made[name], "--temperature") for name in ("router-0", "router-1")] == ["0.5"] * 2
    assert "--temperature" not in made["frontend-0"].command


def test_settings_in_the_environment_are_remembered_for_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWITCHGEAR_ROUTER_TEMPERATURE", "0.5")
    assert specs()["router-0"].environment["SWITCHGEAR_ROUTER_TEMPERATURE"] == "0.5"


def test_with_tls_every_process_is_told_where_its_certificates_and_passwords_are() -> None:
    made = specs(tls=True, envoy=True)
    assert made["etcd-0"].address.startswith("https://")
    assert made["nats-0"].address.startswith("tls://")
    assert flag(made["nats-0"], "--config") == "/run/certificates/nats.conf"
    for component in ("frontend", "router", "kv_indexer", "prefill_worker", "decode_worker"):
        spec = made[f"{component}-0"]
        prefix = f"SWITCHGEAR_{component.upper()}"
        assert spec.environment[f"{prefix}_TLS_KEY_FILE"] == f"/run/certificates/{component}.key"
        assert spec.environment[f"{prefix}_ETCD_USERNAME"] == "switchgear"
        assert (f"{prefix}_NATS_PASSWORD_FILE" in spec.environment) == (
            "--nats-url" in spec.command
        )
        assert spec.probes[0].tls is not None
        assert spec.probes[0].tls.name == certificate_name(component)
    assert "/run/certificates/ca.crt" in flag(made["envoy-0"], "--config-yaml")


def test_without_tls_there_is_no_word_of_certificates() -> None:
    assert "certificates" not in "".join(
        spec.model_dump_json() for spec in specs(envoy=True).values()
    )
