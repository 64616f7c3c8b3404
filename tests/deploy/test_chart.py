"""The Helm chart, rendered by Helm's own code for each service, against Kubernetes' schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint, values_from_yaml

from deploy.delivery.__main__ import ROOT
from libs.common import config
from libs.common.config import ServiceSettings
from libs.common.grpc_server import ALIVE
from libs.common.identity import certificate_name
from services.decode_worker.config import DecodeWorkerSettings
from services.frontend.config import FrontendSettings
from services.kv_indexer.config import KvIndexerSettings
from services.prefill_worker.config import PrefillWorkerSettings
from services.router.config import RouterSettings

CHART = ROOT / "deploy/helm/switchgear"

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "decode_worker": DecodeWorkerSettings,
    "frontend": FrontendSettings,
    "kv_indexer": KvIndexerSettings,
    "prefill_worker": PrefillWorkerSettings,
    "router": RouterSettings,
}

SECURED = {"tls": {"secretName": "router-tls"}, "credentials": {"secretName": "passwords"}}

# The oldest that the chart's kubeVersion allows, and the newest that there are schemas of.
KUBERNETES = ("1.27", kubernetes_validate.latest_version())

every_service = pytest.mark.parametrize("component", sorted(SETTINGS))


def values(component: str, **more: object) -> dict[str, Any]:
    return values_from_yaml((CHART / f"values/{component}.yaml").read_text()) | more


def rendered(component: str, **more: object) -> dict[str, dict[str, Any]]:
    """The objects of a release by kind."""
    name = component.replace("_", "-")
    texts = chart().render(values(component, **more), name=name).values()
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    by_kind = {found["kind"]: found for found in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@cache
def chart() -> Chart:
    return Chart.load(CHART)


def pod(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    assert isinstance(only, dict)
    return only


def environment(component: str, objects: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    fields = {"metadata.name": f"{component}-0", "status.podIP": "10.0.0.1"}
    for entry in container(objects)["env"]:
        if "valueFrom" in entry:
            yield entry["name"], fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            yield entry["name"], entry["value"]


def test_there_are_values_for_each_service() -> None:
    services = {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")}
    assert {path.stem for path in (CHART / "values").iterdir()} == services == SETTINGS.keys()


@every_service
def test_helm_finds_nothing_to_complain_about(component: str) -> None:
    report = lint(CHART, values(component))
    # An icon is recommended; the chart is in no catalogue.
    assert [found for found in report["messages"] if "icon" not in found["error"]] == []
    assert report["errors"] == []


@every_service
@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("autoscaled", [False, True])
def test_objects_are_valid_by_kubernetes_schemas(
    component: str, version: str, autoscaled: bool
) -> None:
    scaling = values(component).get("autoscaling", {}) | {"enabled": autoscaled}
    objects = rendered(component, autoscaling=scaling)
    assert {"Deployment", "PodDisruptionBudget"} <= objects.keys()
    assert ("HorizontalPodAutoscaler" in objects) is autoscaled
    for found in objects.values():
        kubernetes_validate.validate(found, version, strict=True)


@every_service
@pytest.mark.parametrize("version", KUBERNETES)
def test_certificates_and_passwords_are_mounted_from_secrets(component: str, version: str) -> None:
    objects = rendered(component, **SECURED)
    for found in objects.values():
        kubernetes_validate.validate(found, version, strict=True)
    secrets = {
        volume["name"]: volume["secret"]["secretName"]
        for volume in pod(objects)["volumes"]
        if "secret" in volume
    }
    assert secrets == {"tls": "router-tls", "credentials": "passwords"}
    mounted = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    env = dict(environment(component, objects))
    for part, file in (("CA", "ca.crt"), ("CERTIFICATE", "tls.crt"), ("KEY", "tls.key")):
        name = f"SWITCHGEAR_{component.upper()}_TLS_{part}_FILE"
        assert env[name] == f"{mounted['tls']}/{file}"
        assert f"tls_{part.lower()}_file" in SETTINGS[component].model_fields
    assert mounted["credentials"] == "/etc/switchgear/credentials"


@every_service
def test_with_certificates_a_program_in_the_container_asks_for_health(component: str) -> None:
    only = container(rendered(component, **SECURED))
    for kind, service in (("startup", ALIVE), ("readiness", ""), ("liveness", ALIVE)):
        command = only[f"{kind}Probe"]["exec"]["command"]
        assert command[:5] == ["python", "-m", "deploy.local.probe", "grpc", "127.0.0.1:50051"]
        assert command[5:8] == ["--service", service, "--tls"]
        assert command[11:] == [certificate_name(component)]
        env = dict(environment(component, rendered(component, **SECURED)))
        prefix = f"SWITCHGEAR_{component.upper()}_TLS"
        assert command[8:11] == [
            env[f"{prefix}_{part}_FILE"] for part in ("CA", "CERTIFICATE", "KEY")
        ]
    dockerfile = (ROOT / f"services/{component}/Dockerfile").read_text()
    assert "COPY deploy/local/__init__.py deploy/local/probe.py deploy/local/" in dockerfile


@every_service
def test_the_service_accepts_its_settings(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = dict(environment(component, rendered(component)))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings = config.load(SETTINGS[component], [], env, component)
    assert settings.reachable_host == "10.0.0.1"


@every_service
def test_a_pod_is_given_the_time_that_its_process_takes_to_drain(component: str) -> None:
    objects = rendered(component)
    env = dict(environment(component, objects))
    drain_seconds = float(env[f"SWITCHGEAR_{component.upper()}_DRAIN_SECONDS"])
    before = container(objects).get("lifecycle", {}).get("preStop", {})
    wait_seconds = float(before.get("exec", {}).get("command", ["sleep", "0"])[1])
    assert pod(objects)["terminationGracePeriodSeconds"] > drain_seconds + wait_seconds


@every_service
def test_a_process_that_drains_or_waits_for_others_is_not_killed(component: str) -> None:
    only = container(rendered(component))
    assert only["readinessProbe"]["grpc"] == {"port": 50051}
    assert only["startupProbe"]["grpc"] == {"port": 50051, "service": ALIVE}
    assert only["livenessProbe"]["grpc"] == {"port": 50051, "service": ALIVE}


@every_service
def test_all_objects_of_a_release_mean_the_same_pods(component: str) -> None:
    objects = rendered(component)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    if "Service" in objects:
        selectors.append(objects["Service"]["spec"]["selector"])
    assert all(selector.items() <= labels for selector in selectors)


def test_fractions_stay_fractions_and_large_numbers_are_written_out() -> None:
    objects = rendered("router", settings={"temperature": 0.5, "explained_decisions": 10_000_000})
    env = dict(environment("router", objects))
    assert env["SWITCHGEAR_ROUTER_TEMPERATURE"] == "0.5"
    assert env["SWITCHGEAR_ROUTER_EXPLAINED_DECISIONS"] == "10000000"


def test_a_chart_without_a_service_is_refused() -> None:
    with pytest.raises(Exception, match=r"component is not set"):
        chart().render({}, name="nothing")


@every_service
def test_values_files_are_named_as_what_they_start(component: str) -> None:
    assert values(component)["component"] == component
