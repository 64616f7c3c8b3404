"""All that the adapter relies on beyond AsyncLLM's public methods, written against vLLM 0.32.

* `OutputProcessor.process_outputs(outputs, timestamp, ...)`, called for each engine step with what
  all sequences produced, in slices of 128. Wrapped, so that a step is reported as a whole where
  vLLM would wake a task for each of its requests. `request_states[id].external_req_id` gives the
  id that we gave a request. vLLM's own processing stays, for its metrics, but does little: with
  final-only output and no detokenizing it makes no object per token.
* Fields of EngineCoreOutput, PrefillStats and SchedulerStats.
* `AsyncLLM._run_output_handler()` and `.output_handler`: the task that ends when the engine dies.
* `EngineCoreProc.run_engine_core`: what the engine core's process runs, by name.
* `StructuredOutputManager._create_grammar` and `StructuredOutputGrammar.accept_tokens`, there.

`connector` lists what it overrides in vLLM's NIXL connector. `check` fails where any of it is not
there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from libs.engine.vllm_engine import engine_core
from libs.engine.vllm_engine.port import OnOutputs, OverduePull, StepStats


def check() -> None:
    """Raises RuntimeError naming what this vLLM lacks."""
    wanted = {
        EngineCoreOutput: (
            "request_id new_token_ids finish_reason kv_transfer_params prefill_stats "
            "new_logprobs new_prompt_logprobs_tensors events pooling_output"
        ),
        LogprobsLists: "logprob_token_ids logprobs",
        LogprobsTensors: "logprob_token_ids logprobs",
        StructuredOutputManager: "_create_grammar",
        StructuredOutputGrammar: "accept_tokens",
        PrefillStats: "num_local_cached_tokens num_external_cached_tokens",
        SchedulerStats: "num_running_reqs kv_cache_usage kv_connector_stats",
        AsyncLLM: "_run_output_handler notify_kv_transfer_request_rejected collective_rpc",
        EngineCoreProc: "run_engine_core",
        KVConnectorTransferResults: "finished_recving failed_recving",
        NixlPullConnectorScheduler: ("get_num_new_matched_tokens request_finished _stop_heartbeat"),
        NixlPullConnectorWorker: "start_load_kv get_transfer_results",
    }
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in wanted.items()
        for name in names.split()
        if not hasattr(owner, name) and name not in _fields(owner)
    ]
    parameters = [*inspect.signature(OutputProcessor.process_outputs).parameters]
    if parameters[1:3] != ["engine_core_outputs", "engine_core_timestamp"]:
        missing.append("OutputProcessor.process_outputs(outputs, timestamp)")
    if missing:
        raise RuntimeError(f"this vLLM is not the one written for; it lacks {', '.join(missing)}")


def _fields(owner: type) -> set[str]:
    if hasattr(owner, "__struct_fields__"):
        return set(owner.__struct_fields__)
    if hasattr(owner, "__dataclass_fields__"):
        return {field.name for field in fields(owner)}
    return set()


def tap_outputs(llm: Any, on_outputs: OnOutputs) -> None:
    """Reports every engine step to `on_outputs`, on the event loop, after vLLM has seen it."""
    processor = llm.output_processor
    process_outputs = processor.process_outputs
    states = processor.request_states

    def tapped(outputs: Any, timestamp: float | None = None, *args: Any, **kwargs: Any) -> Any:
        # Before vLLM forgets the finished ones. Those not there were aborted.
        known = [
            (state.external_req_id, output)
            for output in outputs
            if (state := states.get(output.request_id)) is not None
        ]
        processed = process_outputs(outputs, timestamp, *args, **kwargs)
        if known:
            on_outputs(known, timestamp or 0.0)
        return processed

    processor.process_outputs = tapped


def start_output_handler(llm: Any) -> asyncio.Task[None]:
    """Starts taking vLLM's outputs on the running loop; the task ends when the engine is dead."""
    llm._run_output_handler()
    task: asyncio.Task[None] = llm.output_handler
    return task


def overdue_pulls(llm: Any, pull_ids: Iterable[str]) -> list[OverduePull]:
    """Puts the ids that we gave requests beside vLLM's own."""
    states = llm.output_processor.request_states
    return [
        OverduePull(pull_id, states[pull_id].external_req_id if pull_id in states else "")
        for pull_id in pull_ids
    ]


def stat_logger(stats: StepStats) -> Callable[[Any, int], StatLoggerBase]:
    """A logger for vLLM's list of them, which keeps `stats` up to date."""

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is None:
                return
            stats.running_requests = scheduler_stats.num_running_reqs
            stats.kv_cache_usage = scheduler_stats.kv_cache_usage
            if transfers := scheduler_stats.kv_connector_stats:
                # Beside a host tier they are by connector.
                transfers = transfers.get("SwitchgearNixlConnector", transfers)
                stats.transferred_bytes += sum(transfers.get("bytes_transferred", ()))
            stats.on_change()

        def log_engine_initialized(self) -> None:
            pass

    return Logger


@contextmanager
def engine_core_dies_with_us() -> Iterator[None]:
    """Within it, vLLM starts engine cores that the kernel kills when this thread is gone."""
    original = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(engine_core.run_engine_core)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(original)
