"""A gRPC server as every service runs it: health, reflection, typed errors, limits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import Gauge

from libs.common import grpc_errors, logs
from libs.common.credentials import CertificateFiles, FollowedCertificates
from libs.common.errors import CallerNotAllowed, CannotListen, SwitchgearError
from libs.common.identity import CALLERS, certificate_name

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


_FOR_ALL_SERVICES = ("/grpc.health.", "/grpc.reflection.")
"""Whoever has a certificate of ours may ask for these."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server shows, and whom it serves."""

    certificates: CertificateFiles
    component: str
    """Which one the server is; CALLERS says who may call it."""

    def credentials(self) -> grpc.ServerCredentials:
        """Take another certificate for new connections when the files are others. Raises ValueError
        naming a file that can't be used."""
        followed = FollowedCertificates(self.certificates)
        shown_version = 0

        def shown_next() -> grpc.ServerCertificateConfiguration | None:
            """Asked before every handshake, one at a time. None: the same as before."""
            nonlocal shown_version
            pem = followed.latest()
            if followed.version == shown_version:
                return None
            shown_version = followed.version
            assert pem.key is not None
            assert pem.certificate is not None
            return grpc.ssl_server_certificate_configuration(
                [(pem.key, pem.certificate)], root_certificates=pem.ca
            )

        # grpc's types know nothing of None, its documentation does.
        return grpc.dynamic_ssl_server_credentials(
            shown_next(),  # type: ignore[arg-type]
            shown_next,  # type: ignore[arg-type]
            require_client_authentication=self.component in CALLERS,
        )


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
    tls: ServerTls | None = None,
    grace_seconds: float = 1.0,
) -> AsyncIterator[GrpcServer]:
    """Runs a server while the body runs. NOT_SERVING until `set_serving(True)`.

    `service_names` are full names, for health and reflection. Without `tls` nothing is encrypted,
    and everybody is served. At the end calls in progress have `grace_seconds` to finish. Raises
    CannotListen.
    """
    interceptors: list[grpc.aio.ServerInterceptor] = [_TypedErrors(tls.component if tls else "")]
    server = grpc.aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    add_services(server)
    reflection.enable_server_reflection(
        [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    _try_to_listen(host, port)
    try:
        bound = (
            server.add_secure_port(f"{host}:{port}", tls.credentials())
            if tls
            else server.add_insecure_port(f"{host}:{port}")
        )
    except RuntimeError as error:
        raise CannotListen("grpc_port", host, port, OSError(str(error))) from error
    running = GrpcServer(server, bound, servicer, service_names)
    await running.set_serving(False)
    await servicer.set(ALIVE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    try:
        yield running
    finally:
        await running.set_serving(False)
        await server.stop(grace_seconds)


def _try_to_listen(host: str, port: int) -> None:
    """Raises CannotListen with the reason, which grpc would write to stderr by itself and not
    raise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except socket.gaierror:
            return  # Of names grpc may know more.
        except OSError as error:
            raise CannotListen("grpc_port", host, port, error) from error


class _TypedErrors(grpc.aio.ServerInterceptor):
    """Turns a SwitchgearError into its status, and any other exception into a logged INTERNAL.

    Refuses callers whose certificate is not of those that may call, and counts the calls in
    progress, too.
    """

    def __init__(self, component: str = "") -> None:
        """`component` with TLS only: which one the server is."""
        self._component = component
        callers = CALLERS.get(component)
        self._callers = callers and {certificate_name(caller) for caller in callers}

    def _admit(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        """Raises CallerNotAllowed."""
        if self._callers is None or method.startswith(_FOR_ALL_SERVICES):
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        shown = [bytes(name).decode(errors="replace") for name in names]
        if self._callers.isdisjoint(shown):
            raise CallerNotAllowed(
                f"{self._component} takes no calls with a certificate of {', '.join(shown)}"
            )

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
                        self._admit(context, method)
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
                        self._admit(context, method)
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
