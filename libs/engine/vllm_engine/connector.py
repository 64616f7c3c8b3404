"""vLLM's NIXL connector, with the checks that it leaves to others. Runs in the engine core.

vLLM's pull connector reads whatever a peer's blocks hold by now, waits for a peer that has
stopped for as long as that takes, and when it gives a read up it frees blocks that the peer may
still write to: a released NIXL read is not cancelled, and its bytes land when the peer goes on.
So here:

* A pull begins only before its deadline, checked when vLLM's scheduler is about to start it: a
  request may have waited in vLLM's queue since it was submitted.
* A pull that ended after the transfer timeout is not used, though it ended well.
* Pulls that take longer than the timeout are listed for the adapter, which aborts the request and
  submits it anew as a whole one. vLLM keeps an aborted request's blocks until its reads have
  really ended, so that late bytes hurt nobody.
* KV that nobody will pull can be let go before its lease ends.

All private names of vLLM's connector that this relies on are in this file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.nixl_utils import NixlWrapper
from vllm.platforms import current_platform

from libs.engine.vllm_engine.requests import PULL_DEADLINE, RELEASE

TRANSFER_TIMEOUT_SECONDS = "switchgear_transfer_timeout_seconds"
"""Key in vLLM's kv_connector_extra_config."""

SIDE_CHANNEL_PORT = "switchgear_side_channel_port"
"""Key in vLLM's kv_connector_extra_config. vLLM takes the port from the environment, all of which
it takes for something that compiled models depend on: with a port of its own there, each worker
would compile the model for itself, at every start."""

PROGRESS_PAUSE_MICROSECONDS = 1000


class SwitchgearNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """What vLLM loads; one object in the scheduler and one in each worker of the engine core."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # Not the pull connector's own: it would make a second NIXL agent.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = _Scheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = _Worker(vllm_config, self.engine_id, kv_cache_config)


class _Scheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if not hasattr(self, "_reqs_need_send"):
            raise RuntimeError("this vLLM is not the one written for; it keeps leases elsewhere")
        if not hasattr(self, "side_channel_port"):
            raise RuntimeError("this vLLM is not the one written for; it offers its KV elsewhere")
        self.side_channel_port = vllm_config.kv_transfer_config.get_from_extra_config(
            SIDE_CHANNEL_PORT, None
        )

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill") and time.monotonic() > params[PULL_DEADLINE]:
            params["do_remote_prefill"] = False
            self._stop_heartbeat(request.request_id)
            return 0, False
        matched: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params
        if params and RELEASE in params:
            # A lease that ends now; ignored where the KV was pulled already.
            self._reqs_need_send[params[RELEASE]] = time.perf_counter()
            return False, None
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        return finished


class _Worker(NixlPullConnectorWorker):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        with _sleeping_progress_thread() if current_platform.is_cpu() else nullcontext():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self._timeout_seconds: float = vllm_config.kv_transfer_config.get_from_extra_config(
            TRANSFER_TIMEOUT_SECONDS, None
        )
        self._begun: dict[str, float] = {}

    def start_load_kv(self, metadata: Any) -> None:
        now = time.monotonic()
        for request_id, pull in metadata.reqs_to_recv.items():
            if pull.awaiting_kvs:
                self._begun[request_id] = now
        super().start_load_kv(metadata)

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        overdue = set(self.overdue())
        results.failed_recving |= results.finished_recving & overdue
        for request_id in results.finished_recving:
            self._begun.pop(request_id, None)
        return results

    def overdue(self) -> list[str]:
        """vLLM's ids of the requests whose pulls are still going on after the timeout."""
        begun_before = time.monotonic() - self._timeout_seconds
        return [request_id for request_id, begun in self._begun.items() if begun < begun_before]


@contextmanager
def _sleeping_progress_thread() -> Iterator[None]:
    """Within it, NIXL agents are made whose progress thread waits for events between its polls.

    NIXL's Python wrapper fixes the pause at 0, and the thread keeps a core busy even when there is
    nothing to do: cheap beside a GPU, but on a CPU that core is the engine's own.
    """
    bindings = sys.modules[NixlWrapper.__module__].nixlBind
    original = bindings.nixlAgentConfig

    class Config(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, PROGRESS_PAUSE_MICROSECONDS if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Config
    try:
        yield
    finally:
        bindings.nixlAgentConfig = original


class PullReport:
    """Mixed into vLLM's worker class, for collective_rpc."""

    def switchgear_overdue_pulls(self) -> list[str]:
        """See `_Worker.overdue`."""
        group = get_kv_transfer_group()
        if isinstance(group, MultiConnector):
            (group,) = (
                each for each in group.sub_connectors if isinstance(each, SwitchgearNixlConnector)
            )
        worker = group.connector_worker
        assert isinstance(worker, _Worker)
        return worker.overdue()


# Beside a host tier vLLM finds the class that its statistics are of by name alone.
KVConnectorFactory.register_connector(
    SwitchgearNixlConnector.__name__, __name__, SwitchgearNixlConnector.__name__
)
