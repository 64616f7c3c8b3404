"""What routing lacks just now, and who says so: one gauge, and one log line for each change."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prometheus_client import Gauge

from libs.common import logs

log = logs.get(__name__)

NO_KV_INDEXER = "no_kv_indexer"

DEGRADED = Gauge(
    "switchgear_router_degraded",
    "1 while routing lacks what it needs, and falls back to load where it has nothing else",
    ["reason"],
)


class Degraded:
    """Reasons by source: the KV indexer, or a worker by name."""

    def __init__(self) -> None:
        self._reasons: dict[str, frozenset[str]] = {}
        DEGRADED.labels(NO_KV_INDEXER).set(0)

    def report(self, source: str, reasons: Collection[str]) -> None:
        """Says all that the source lacks now; empty when it lacks nothing."""
        before = self._reasons.get(source, frozenset())
        now = frozenset(reasons)
        if now == before:
            return
        if now:
            self._reasons[source] = now
            log.warning("routing is degraded", source=source, reasons=sorted(now))
        else:
            del self._reasons[source]
            log.info("routing is degraded no longer", source=source, reasons=sorted(before))
        for reason in before ^ now:
            DEGRADED.labels(reason).set(any(reason in held for held in self._reasons.values()))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Sources and their reasons, in order."""
        for source, reasons in sorted(self._reasons.items()):
            for reason in sorted(reasons):
                yield source, reason
