"""Envoy's configuration, as it is and filled in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.envoy.configuration import TEMPLATE, TLS_PORT, Address, configuration
from libs.common.identity import certificate_name


def listeners(config: dict[str, Any]) -> dict[str, tuple[str, int]]:
    found = {}
    for listener in config["static_resources"]["listeners"]:
        address = listener["address"]["socket_address"]
        found[listener["name"]] = (address["address"], address["port_value"])
    return found


def endpoints(config: dict[str, Any], cluster: str) -> list[tuple[str, int]]:
    [found] = [c for c in config["static_resources"]["clusters"] if c["name"] == cluster]
    [group] = found["load_assignment"]["endpoints"]
    addresses = [e["endpoint"]["address"]["socket_address"] for e in group["lb_endpoints"]]
    return [(address["address"], address["port_value"]) for address in addresses]


def assert_accepted(path: Path) -> None:
    envoy = Path(sys.executable).parent / "envoy"
    checked = subprocess.run(
        [envoy, "--mode", "validate", "--config-path", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    # A deprecated field is a warning, and an error of the next version.
    assert "[warning]" not in checked.stderr, checked.stderr


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with a certificate for localhost and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-keyout", "tls.key", "-out", "tls.crt"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=True)
    return tmp_path


def test_the_template_runs_as_it_is() -> None:
    assert_accepted(TEMPLATE)


def test_addresses_are_put_in_place_of_names() -> None:
    config = configuration(
        listen=Address("127.0.0.1", 10_000),
        metrics=Address("127.0.0.1", 10_001),
        admin=Address("127.0.0.1", 10_002),
        clusters={"frontend_grpc": [Address("127.0.0.1", 1), Address("127.0.0.1", 2)]},
    )
    assert listeners(config) == {"edge": ("127.0.0.1", 10_000), "metrics": ("127.0.0.1", 10_001)}
    assert config["admin"]["address"]["socket_address"]["port_value"] == 10_002
    assert endpoints(config, "admin") == [("127.0.0.1", 10_002)]
    assert endpoints(config, "frontend_grpc") == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert endpoints(config, "frontend_rest") == [("frontend", 8000)]


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="frontend_http"):
        configuration(clusters={"frontend_http": []})


def test_tls_is_a_further_listener_with_the_same_routes(certificates: Path, tmp_path: Path) -> None:
    config = configuration(tls_folder=certificates)
    assert listeners(config)["edge_tls"] == ("0.0.0.0", TLS_PORT)
    plain, _, encrypted = config["static_resources"]["listeners"]
    assert encrypted["filter_chains"][0]["filters"] == plain["filter_chains"][0]["filters"]
    assert "transport_socket" not in plain["filter_chains"][0]
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(config))
    assert_accepted(path)


@pytest.mark.parametrize("has_certificate", [True, False])
def test_a_container_offers_tls_when_there_is_a_certificate(
    certificates: Path, has_certificate: bool
) -> None:
    folder = certificates if has_certificate else certificates / "none"
    command = [sys.executable, "-m", "deploy.envoy.configuration", "--tls-folder", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ("edge_tls" in listeners(json.loads(printed.stdout))) == has_certificate


def test_services_with_tls_are_called_with_it_and_routers_not_at_all(
    certificates: Path, tmp_path: Path
) -> None:
    config = configuration(services_ca=certificates / "tls.crt")
    found = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    context = found["frontend_grpc"]["transport_socket"]["typed_config"]
    assert context["sni"] == certificate_name("frontend")
    assert "transport_socket" not in found["frontend_rest"]
    assert "router_grpc" not in json.dumps(config)
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(config))
    assert_accepted(path)


@pytest.mark.parametrize("has_ca", [True, False])
def test_a_container_calls_with_tls_when_there_is_a_ca(certificates: Path, has_ca: bool) -> None:
    file = certificates / ("tls.crt" if has_ca else "none.crt")
    command = [sys.executable, "-m", "deploy.envoy.configuration", "--services-ca", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ("UpstreamTlsContext" in printed.stdout) == has_ca
