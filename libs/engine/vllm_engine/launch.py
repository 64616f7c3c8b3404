"""Loads vLLM, on a thread of its own.

Loading blocks for many seconds, so it can't be done on the event loop. It is a thread of its own
that lives as long as the engine, because the kernel counts the thread that started the engine
core, not the process, as the parent that it dies with.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from libs.common import logs
from libs.common.config import ConfigError
from libs.common.errors import InvalidRequest
from libs.engine.interface import (
    EngineInfo,
    EngineKvEvent,
    EngineRequest,
    Leg,
    PoolingTask,
)
from libs.engine.vllm_engine import kv_stream
from libs.engine.vllm_engine.device_turn import device_turn, lock_file
from libs.engine.vllm_engine.port import OnOutputs, OverduePull, StepStats, Vllm
from libs.engine.vllm_engine.requests import RELEASE, TRANSFER_BACKEND
from libs.engine.vllm_engine.settings import VllmSettings

log = logs.get(__name__)

CORE_SHUTDOWN_SECONDS = 5.0
"""What the engine core gets to end by itself before it is killed."""
CLOSE_SECONDS = 15.0


async def load(settings: VllmSettings) -> Vllm:
    """Loads the model. Raises what vLLM raised; cancelled, the thread shuts vLLM down in its own
    time."""
    folder = Path(tempfile.mkdtemp(prefix="switchgear-vllm-"))
    stats = StepStats()
    thread = _VllmThread(settings, folder, stats)
    try:
        llm = await thread.load()
        if settings.task != "generate":
            await _check_task(llm, settings.task)
    except BaseException:
        thread.stop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _LoadedVllm(llm, thread, folder, stats, settings)


async def _check_task(llm: Any, task: str) -> None:
    tasks = await llm.get_supported_tasks()
    if task not in tasks:
        raise ConfigError(f"the model can't {task}; what vLLM can do with it: {', '.join(tasks)}")


class _LoadedVllm(Vllm):
    def __init__(
        self, llm: Any, thread: _VllmThread, folder: Path, stats: StepStats, settings: VllmSettings
    ) -> None:
        self._llm = llm
        self._thread = thread
        self._folder = folder
        self.stats = stats
        config = llm.vllm_config
        self.info = EngineInfo(
            block_size_tokens=config.cache_config.block_size,
            total_kv_blocks=config.cache_config.num_gpu_blocks,
            context_length_tokens=config.model_config.max_model_len,
            max_running_requests=config.scheduler_config.max_num_seqs,
            transfer_backend="" if settings.leg is Leg.WHOLE else TRANSFER_BACKEND,
            publishes_kv_events=True,
            pooling_tasks=(PoolingTask.EMBED,) if settings.task == "embed" else (),
            has_host_tier=settings.host_kv_bytes is not None,
        )

    def run(self, on_outputs: OnOutputs) -> asyncio.Task[None]:
        from libs.engine.vllm_engine import internals

        internals.tap_outputs(self._llm, on_outputs)
        return internals.start_output_handler(self._llm)

    async def add(self, vllm_id: str, request: EngineRequest, arguments: Mapping[str, Any]) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        params_of = _sampling_params if request.pooling is None else _pooling_params
        try:
            await self._llm.add_request(
                vllm_id,
                tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
                params_of(arguments),
                priority=request.priority,
            )
        except (VLLMClientError, ValueError, TypeError) as error:
            # The name that it knows is a folder of this machine.
            name = f"Model {self._llm.model_config.served_model_name!r}"
            text = str(error).replace(name, "The model")
            param = getattr(error, "parameter", None) or _suspect(request)
            raise InvalidRequest(text, param=param) from error

    async def abort(self, vllm_ids: Sequence[str]) -> None:
        await self._llm.abort(vllm_ids)

    async def release(self, vllm_request_id: str) -> None:
        await self._llm.notify_kv_transfer_request_rejected(
            f"release.{vllm_request_id}", {RELEASE: vllm_request_id}
        )

    async def overdue_pulls(self) -> list[OverduePull]:
        from libs.engine.vllm_engine import internals

        (pull_ids,) = await self._llm.collective_rpc("switchgear_overdue_pulls")
        return internals.overdue_pulls(self._llm, pull_ids)

    def kv_events(self) -> AsyncIterator[list[EngineKvEvent]]:
        return kv_stream.follow(self._folder)

    async def close(self) -> None:
        await self._thread.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _sampling_params(arguments: Mapping[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if (constraint := arguments.get("structured_outputs")) is not None:
        arguments = {**arguments, "structured_outputs": StructuredOutputsParams(**constraint)}
    return SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **arguments)


def _pooling_params(arguments: Mapping[str, Any]) -> Any:
    from vllm import PoolingParams

    return PoolingParams(**arguments)


def _suspect(request: EngineRequest) -> str | None:
    """Which field a refusal that names none is about: what only vLLM can check."""
    if request.pooling is not None:
        return None if request.pooling.dimensions is None else "dimensions"
    return None if request.sampling.constraint is None else "constraint"


class _VllmThread:
    """Owns one AsyncLLM, from `load` to `close`."""

    def __init__(self, settings: VllmSettings, folder: Path, stats: StepStats) -> None:
        self._settings = settings
        self._folder = folder
        self._stats = stats
        self._closing = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Any] = self._loop.create_future()
        self._closed = asyncio.Event()
        # A daemon, so that a process told to stop while it loads need not wait for it.
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)

    async def load(self) -> Any:
        """The AsyncLLM, ready for requests. Raises what vLLM raised."""
        self._thread.start()
        return await self._loaded

    def stop(self) -> None:
        """Has vLLM shut down, as soon as it is loaded."""
        self._closing.set()

    async def close(self) -> None:
        """Ends the engine core; returns within CLOSE_SECONDS even if vLLM is stuck."""
        self.stop()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            log.error("vllm did not shut down", seconds=CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            llm = _load(self._settings, self._folder, self._stats, self._closing)
        except BaseException as error:
            self._tell(self._set_loaded, None, error)
            return
        self._tell(self._set_loaded, llm, None)
        self._closing.wait()
        try:
            llm.shutdown(timeout=CORE_SHUTDOWN_SECONDS)
        except Exception:
            log.exception("vllm failed to shut down")
        self._tell(self._closed.set)

    def _tell(self, callback: Any, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody waits any more.
            log.warning("vllm outlived the event loop")

    def _set_loaded(self, llm: Any, error: BaseException | None) -> None:
        if self._loaded.cancelled():
            return
        if error is not None:
            self._loaded.set_exception(error)
        else:
            self._loaded.set_result(llm)


def _load(settings: VllmSettings, folder: Path, stats: StepStats, closing: threading.Event) -> Any:
    _set_environment(settings)
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from libs.engine.vllm_engine import internals

    internals.check()
    if not current_platform.is_cpu():
        # On a GPU without NVLink UCX reads another process's memory directly only when told to,
        # and else goes by TCP.
        os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
    arguments = engine_args(settings, folder)
    # A fraction of a GPU means that others have the rest of it.
    is_shared = settings.device_memory_fraction is not None
    with (
        device_turn(lock_file(os.environ), closing) if is_shared else nullcontext(),
        internals.engine_core_dies_with_us(),
    ):
        return AsyncLLM.from_engine_args(
            arguments,
            # Batches as large as `vllm serve` makes them on this GPU; else they are small on all.
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[internals.stat_logger(stats)],
        )


def _set_environment(settings: VllmSettings) -> None:
    """What vLLM takes from the environment only, and reads when it is imported."""
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = settings.nixl_host
    # A process with gRPC's threads can't be forked.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def engine_args(settings: VllmSettings, folder: Path) -> Any:
    """vLLM's arguments, with the platform's defaults where the settings leave a choice."""
    from vllm.config import KVEventsConfig, KVTransferConfig, StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from libs.engine.vllm_engine import connectors

    is_cpu = current_platform.is_cpu()
    publish, replay = kv_stream.endpoints(folder)
    arguments: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len_tokens,
        "block_size": settings.block_size_tokens or (32 if is_cpu else 16),
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "max_num_seqs": settings.max_running_requests or (64 if is_cpu else None),
        "enforce_eager": is_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "disable_log_stats": False,
        "scheduling_policy": "priority",
        # A backend chosen for each request would still be the first one's. Where JSON may have any
        # blanks, small models go on with them for ever.
        "structured_outputs_config": StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True
        ),
        "kv_events_config": KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=publish,
            replay_endpoint=replay,
            topic=kv_stream.TOPIC,
        ),
    }
    if settings.device_memory_fraction is not None:
        arguments["gpu_memory_utilization"] = settings.device_memory_fraction
    if settings.task != "generate":
        arguments |= {
            "runner": "pooling",
            # vLLM's own choice: no use for models that look both ways, or take the mean.
            "enable_prefix_caching": None,
        }
    transfer = connectors.transfer_arguments(settings, is_cpu=is_cpu)
    if settings.leg is not Leg.WHOLE:
        arguments["worker_extension_cls"] = f"{connectors.PACKAGE}.connector.PullReport"
    if transfer is not None:
        arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    return AsyncEngineArgs(**arguments)
