"""What docker-compose.yml and the Dockerfiles say fits the repository."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from deploy.local.topology import REPOSITORY
from libs.common.config import ServiceSettings
from services.decode_worker.config import DecodeWorkerSettings
from services.frontend.config import FrontendSettings
from services.kv_indexer.config import KvIndexerSettings
from services.prefill_worker.config import PrefillWorkerSettings
from services.router.config import RouterSettings

COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
DEFAULTS = dict(
    re.findall(r"^([A-Z_]+)=(.*)$", (REPOSITORY / ".env").read_text(), flags=re.MULTILINE)
)
SETTINGS: dict[str, type[ServiceSettings]] = {
    "frontend": FrontendSettings,
    "router": RouterSettings,
    "kv_indexer": KvIndexerSettings,
    "prefill_worker": PrefillWorkerSettings,
    "decode_worker": DecodeWorkerSettings,
}
ENGINES = ("", "-sim", "-gpu")
WORKERS = [f"{role}-worker{engine}" for role in ("prefill", "decode") for engine in ENGINES]

DOCKERFILES = sorted(
    {
        service["build"]["dockerfile"]
        for service in COMPOSE["services"].values()
        if "build" in service
    }
)


def settings_named_in(text: str) -> set[str]:
    return set(re.findall(r"\bSWITCHGEAR_[A-Z_]+(?=[:=])", text))


@pytest.mark.parametrize("path", [f"services/{name}/Dockerfile" for name in SETTINGS])
def test_a_dockerfile_names_only_settings_that_there_are(path: str) -> None:
    assert_settings_exist(settings_named_in((REPOSITORY / path).read_text()))


def test_the_compose_file_names_only_settings_that_there_are() -> None:
    named = settings_named_in((REPOSITORY / "docker-compose.yml").read_text())
    assert len(named) > 20
    assert_settings_exist(named)


def assert_settings_exist(named: set[str]) -> None:
    known = {"SWITCHGEAR_CACHE"} | {
        f"{settings.model_config['env_prefix']}{field}".upper()
        for settings in SETTINGS.values()
        for field in settings.model_fields
    }
    # A process does not start with one that it does not know.
    assert named - known == set()


def test_every_variable_has_a_default() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)\}", (REPOSITORY / "docker-compose.yml").read_text()))
    assert used <= DEFAULTS.keys()


def test_everything_is_built_from_files_of_the_repository_or_pinned() -> None:
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert (REPOSITORY / service["build"]["dockerfile"]).is_file(), name
            assert "BASE_IMAGE" in service["build"]["args"], name
        else:
            assert service["profiles"] == ["observe"], name
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_without_a_profile_on_the_command_line_one_engine_runs() -> None:
    chosen = {DEFAULTS["COMPOSE_PROFILES"]}
    running = [
        name
        for name, service in COMPOSE["services"].items()
        if not service.get("profiles") or chosen & set(service["profiles"])
    ]
    assert [name for name in running if name in WORKERS] == ["prefill-worker", "decode-worker"]
    assert "model" in running


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_has_a_memory_limit_and_ends_its_logs_somewhere(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["mem_limit"]
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_images_run_as_nobody_special_from_a_base_that_can_be_chosen(path: str) -> None:
    text = (REPOSITORY / path).read_text()
    assert "ARG BASE_IMAGE=python:3.11-slim-bookworm" in text
    assert re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)[-1] == "${BASE_IMAGE}"
    assert "\nUSER 10001\n" in text


def test_prometheus_asks_all_services() -> None:
    config = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    asked = {
        name
        for job in config["scrape_configs"]
        for discovery in job["dns_sd_configs"]
        for name in discovery["names"]
    }
    assert {"frontend", "router", "kv-indexer", "envoy", "etcd", *WORKERS} == asked


def test_grafana_knows_how_often_prometheus_asks() -> None:
    folder = REPOSITORY / "deploy"
    config = yaml.safe_load((folder / "prometheus/prometheus.yml").read_text())
    sources = folder / "grafana/provisioning/datasources/datasources.yaml"
    [source] = [
        source
        for source in yaml.safe_load(sources.read_text())["datasources"]
        if source["type"] == "prometheus"
    ]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


@pytest.mark.parametrize("name", ["frontend", "router", *WORKERS])
def test_every_service_that_traces_is_told_where_to(name: str) -> None:
    endpoints = [
        value
        for setting, value in COMPOSE["services"][name]["environment"].items()
        if setting.endswith("_OTLP_ENDPOINT")
    ]
    assert endpoints == ["${OTLP_ENDPOINT}"]
