"""A gRPC server as every service runs it: health, reflection, typed errors, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import Gauge

from libs.common import grpc_errors, logs
from libs.common.errors import SwitchgearError

log = logs.get(__name__)

CALLS = Gauge(
    "switchgear_grpc_calls", "Calls in progress, sessions among them, by full method.", ["method"]
)

MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of a million tokens is some 4 MB; nothing sane is larger than this."""

ALIVE = "alive"
"""What health checks name to learn whether the process answers at all, drained or not."""

_BOTH_ENDS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Pings find peers whose host is gone; sessions are otherwise silent when idle.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # What ends the connection to a process that is stopped: its kernel still takes our bytes.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

_SERVER_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    # Two processes must not share a port by accident.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Each connection of ours is its own; shared subchannels would share their backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


class GrpcServer:
    """A started server."""

    def __init__(
        self,
        server: grpc.aio.Server,
        port: int,
        servicer: health.aio.HealthServicer,
        names: Sequence[str],
    ) -> None:
        self.server = server
        self.port = port
        self._health = servicer
        self._names = names

    async def set_serving(self, is_serving: bool) -> None:
        """Answers health checks from now on with SERVING or NOT_SERVING."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, status)


@asynccontextmanager
async def serving(
    host: str,
    port: int,
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    grace_seconds: float = 1.0,
) -> AsyncIterator[GrpcServer]:
    """Runs a server while the body runs. NOT_SERVING until `set_serving(True)`.

    `service_names` are full names, for health and reflection. At the end calls in progress have
    `grace_seconds` to finish. Raises OSError when the port is taken.
    """
    server = grpc.aio.server(interceptors=[_TypedErrors()], options=_SERVER_OPTIONS)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    add_services(server)
    reflection.enable_server_reflection(
        [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"can't listen on {host}:{port}: {error}") from error
    running = GrpcServer(server, bound, servicer, service_names)
    await running.set_serving(False)
    await servicer.set(ALIVE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    try:
        yield running
    finally:
        await running.set_serving(False)
        await server.stop(grace_seconds)


class _TypedErrors(grpc.aio.ServerInterceptor):
    """Turns a SwitchgearError into its status, and any other exception into a logged INTERNAL.

    Counts the calls in progress, too.
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        in_progress = CALLS.labels(method)
        if handler.unary_unary:
            inner = handler.unary_unary

            async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                with in_progress.track_inprogress():
                    try:
                        return await inner(request, context)
                    except Exception as error:
                        await end_with(context, method, error)

            return grpc.unary_unary_rpc_method_handler(
                unary, handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream or handler.stream_stream:
            inner_stream = handler.unary_stream or handler.stream_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
                with in_progress.track_inprogress():
                    try:
                        result = inner_stream(request, context)
                        if hasattr(result, "__aiter__"):
                            async for response in result:
                                await context.write(response)
                        else:
                            await result
                    except Exception as error:
                        await end_with(context, method, error)

            make = (
                grpc.unary_stream_rpc_method_handler
                if handler.unary_stream
                else grpc.stream_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        return handler


async def end_with(
    context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception
) -> None:
    """Ends a call with the status that stands for the error. Always raises, as grpc wants it."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, SwitchgearError):
        log.error("call failed", method=method, exc_info=error)
    try:
        await context.abort_with_status(grpc_errors.to_status(error))
    except grpc.aio.InternalError:
        # The client has gone, or its deadline has passed, and nobody is there to tell. grpc would
        # log that as an error of ours.
        raise asyncio.CancelledError from None
