"""What routing lacks just now, and of whom: one gauge, and log lines for each change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client import Gauge

from libs.common import logs

log = logs.get(__name__)

NO_KV_INDEXER = "no_kv_indexer"

MAX_NAMED = 16
"""Workers that a log line names. An explanation names all."""

DEGRADED = Gauge(
    "switchgear_router_degraded",
    "1 while routing lacks what it needs, and falls back to load where it has nothing else",
    ["reason"],
)


class Lack(NamedTuple):
    """One thing that routing lacks."""

    reason: str
    source: str
    """By name, the worker whose predictions are wrong, or the KV indexer that lacks something or
    does not answer."""
    address: str = ""
    """Of a KV indexer."""
    workers: tuple[str, ...] = ()
    """By name, those whose blocks a KV indexer may have wrong; empty: all of them."""
    details: str = ""
    """What else is known. May change without a log line."""


class Degraded:
    """Lacks by teller: all KV indexers together, or a worker by name."""

    def __init__(self) -> None:
        self._lacks: dict[str, list[Lack]] = {}
        DEGRADED.labels(NO_KV_INDEXER).set(0)

    def report(self, teller: str, lacks: list[Lack]) -> None:
        """Says all that is lacking by this teller now; empty when it lacks nothing. No two have the
        same reason and source."""
        before = self._lacks.get(teller, [])
        if lacks == before:
            return
        if lacks:
            self._lacks[teller] = lacks
        else:
            del self._lacks[teller]
        told = {(lack.reason, lack.source): lack for lack in before}
        for lack in lacks:
            known = told.pop((lack.reason, lack.source), None)
            if known is None or not set(known.workers).issuperset(lack.workers):
                log.warning("routing is degraded", **_fields(lack))
        for lack in told.values():
            log.info("routing is degraded no longer", reason=lack.reason, source=lack.source)
        for reason in {lack.reason for lack in (*before, *lacks)}:
            DEGRADED.labels(reason).set(any(reason == lack.reason for lack in self))

    def __iter__(self) -> Iterator[Lack]:
        """All of them, in order."""
        yield from sorted(
            (lack for lacks in self._lacks.values() for lack in lacks),
            key=lambda lack: (lack.source, lack.reason),
        )


def _fields(lack: Lack) -> dict[str, object]:
    """Those that say something."""
    said = {name: value for name, value in lack._asdict().items() if value}
    if len(lack.workers) > MAX_NAMED:
        said["workers"] = lack.workers[:MAX_NAMED]
        said["more_workers"] = len(lack.workers) - MAX_NAMED
    return said
