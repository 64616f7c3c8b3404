"""Who is who under TLS: the name that a certificate carries, and who may call whom.

The name says what a process is and not where: addresses change, and the caller knows what it
expects at one. So a worker's certificate is of no use to pose as a router.
"""

from __future__ import annotations

from collections.abc import Mapping

DOMAIN = "switchgear"

WORKER = "worker"
"""Prefill and decode workers have the same name: they offer the same service, and hold the same
prompts."""

CLIENT = "client"
"""People's tools, scripts and other teams."""

CALLERS: Mapping[str, frozenset[str]] = {
    "router": frozenset({"frontend", CLIENT}),
    # Its own: `python -m services.kv_indexer verify` is run beside one.
    "kv_indexer": frozenset({"router", "kv_indexer", CLIENT}),
    "prefill_worker": frozenset({"router", "kv_indexer", "frontend", CLIENT}),
    "decode_worker": frozenset({"router", "kv_indexer", "frontend", CLIENT}),
}
"""Whose certificates each service takes calls from. The frontend is not in it: who calls it has an
API key, and needs no certificate."""


def certificate_name(component: str) -> str:
    """What the certificate of a component says it is, such as kv-indexer.switchgear."""
    role = WORKER if component.endswith("_worker") else component
    return f"{role.replace('_', '-')}.{DOMAIN}"
