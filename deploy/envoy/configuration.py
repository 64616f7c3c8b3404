"""Fills in envoy.yaml: where to listen, where the services are, whether with TLS.

`python -m deploy.envoy.configuration` prints the result as JSON, which Envoy reads as well.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = Path(__file__).with_name("envoy.yaml")
TLS_PORT = 8443
FRONTEND_NAME = "frontend.switchgear"
"""In frontends' certificates."""

_TLS_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"


@dataclass(frozen=True, slots=True)
class Address:
    """A host, by name or number, and a port."""

    host: str
    port: int


def configuration(
    *,
    listen: Address | None = None,
    metrics: Address | None = None,
    admin: Address | None = None,
    clusters: Mapping[str, Sequence[Address]] | None = None,
    tls_folder: Path | None = None,
    services_ca: Path | None = None,
) -> dict[str, Any]:
    """The template with what is given in place of what it says.

    `clusters` has the addresses of clusters by their name. `tls_folder` is where Envoy will find
    tls.crt and tls.key; it then listens on port 8443, too. `services_ca` is the CA of services that
    use TLS among each other. Raises KeyError for an unknown cluster.
    """
    config: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text())
    # Aliases of YAML are the same object; what is changed here must not change elsewhere.
    config = json.loads(json.dumps(config))
    clusters = dict(clusters or {})
    edge, metrics_listener = config["static_resources"]["listeners"]
    if listen is not None:
        edge["address"] = _socket_address(listen)
    if metrics is not None:
        metrics_listener["address"] = _socket_address(metrics)
    if admin is not None:
        config["admin"]["address"] = _socket_address(admin)
        clusters["admin"] = [admin]
    by_name = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    for name, addresses in clusters.items():
        endpoints = [{"endpoint": {"address": _socket_address(address)}} for address in addresses]
        by_name[name]["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    if services_ca is not None:
        _call_with_tls(config, services_ca)
    if tls_folder is not None:
        config["static_resources"]["listeners"].append(_with_tls(edge, tls_folder))
    return config


def _with_tls(listener: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same listener on another port, for connections with TLS."""
    encrypted = copy.deepcopy(listener)
    encrypted["name"] = f"{listener['name']}_tls"
    encrypted["address"]["socket_address"]["port_value"] = TLS_PORT
    certificate = {
        "certificate_chain": {"filename": str(folder / "tls.crt")},
        "private_key": {"filename": str(folder / "tls.key")},
        # Another certificate in the folder is taken without a restart.
        "watched_directory": {"path": str(folder)},
    }
    for chain in encrypted["filter_chains"]:
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TLS_TYPES}.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                    "tls_certificates": [certificate],
                },
            },
        }
    return encrypted


def _call_with_tls(config: dict[str, Any], ca_file: Path) -> None:
    """Calls frontends' gRPC with TLS. Routers ask for certificates, and Envoy would vouch with its
    own for callers that it has not looked at: so nobody comes to them this way."""
    clusters = config["static_resources"]["clusters"]
    config["static_resources"]["clusters"] = [
        cluster for cluster in clusters if cluster["name"] != "router_grpc"
    ]
    [frontend] = (cluster for cluster in clusters if cluster["name"] == "frontend_grpc")
    name = {"san_type": "DNS", "matcher": {"exact": FRONTEND_NAME}}
    frontend["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TLS_TYPES}.UpstreamTlsContext",
            "sni": FRONTEND_NAME,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "validation_context": {
                    "trusted_ca": {"filename": str(ca_file)},
                    "match_typed_subject_alt_names": [name],
                },
            },
        },
    }
    edge = config["static_resources"]["listeners"][0]
    [connections] = edge["filter_chains"][0]["filters"]
    for host in connections["typed_config"]["route_config"]["virtual_hosts"]:
        for route in host["routes"]:
            if route.get("route", {}).get("cluster") == "router_grpc":
                del route["route"]
                route["direct_response"] = {"status": 404}


def _socket_address(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def main() -> None:
    """Prints the configuration for a container."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tls-folder", type=Path, help="TLS is offered when tls.crt and tls.key are in it"
    )
    parser.add_argument(
        "--services-ca", type=Path, help="the services' CA; they are called with TLS if it is there"
    )
    given = parser.parse_args()
    folder: Path | None = given.tls_folder
    if folder is not None and not (folder / "tls.crt").is_file():
        folder = None
    ca_file: Path | None = given.services_ca
    if ca_file is not None and not ca_file.is_file():
        ca_file = None
    print(json.dumps(configuration(tls_folder=folder, services_ca=ca_file)))


if __name__ == "__main__":
    main()
