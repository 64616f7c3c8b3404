"""What a request does when the worker or router that had it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import Counter

from libs.common import logs
from libs.common.errors import SwitchgearError
from services.frontend.core.attempt import Attempts

log = logs.get(__name__)


async def recovered(
    attempts: Attempts,
    error: SwitchgearError,
    failed_instance_id: int,
    migrations: Counter,
    log_ids: Mapping[str, str],
) -> bool:
    """Whether to try again, once the pause before that is over; False gives up."""
    pause_seconds = attempts.pause_after(error, failed_instance_id)
    if pause_seconds is None:
        return False
    facts = {**log_ids, "reason": error.reason, "error": error.message}
    if not pause_seconds:
        migrations.inc()
        if failed_instance_id:
            facts["failed_instance_id"] = f"{failed_instance_id:016x}"
        log.info("request migrates", **facts, produced_tokens=len(attempts.produced))
        return True
    if attempts.waited_seconds == pause_seconds:  # Before, it has not waited.
        log.info(
            "request waits for a worker", **facts, most_seconds=attempts.policy.patience_seconds
        )
    await asyncio.sleep(pause_seconds)
    return True
