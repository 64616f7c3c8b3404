"""Background tasks with an owner, and the process's life from start to stop signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

import uvloop

from libs.common import config, logs, tracing
from libs.common.config import ServiceSettings
from libs.common.errors import CannotListen, CredentialsRefused, EngineDied

log = logs.get(__name__)

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Runs a coroutine beside the body; cancels and awaits it at the end.

    If it fails the traceback is logged at once, and raised when the body is left.
    """
    task = asyncio.create_task(coroutine)
    task.add_done_callback(_log_failure)
    try:
        yield task
    finally:
        task.cancel()
        # Not `await task`: its cancellation and our own would look the same.
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task failed", task=task.get_name(), exc_info=error)


def stop_on(*signals: signal.Signals) -> asyncio.Event:
    """An event that the first of these signals sets; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(received: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + received)
        log.info("stopping", signal=received.name)
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    return stop


def run_service(
    component: str,
    settings_class: type[SettingsT],
    serve: Callable[[SettingsT, asyncio.Event], Awaitable[None]],
) -> None:
    """The `main` of a service: settings, logging, event loop, signals.

    `serve` runs until the event is set. An exception from it is logged and exits with 1.
    """
    settings = config.exit_on_bad_settings(
        settings_class, sys.argv[1:], os.environ, f"python -m services.{component}"
    )
    logs.configure(settings.name or component, settings.log_level, settings.log_format)
    log.info("starting", pid=os.getpid(), settings=settings.model_dump(mode="json"))

    async def main() -> None:
        await serve(settings, stop_on(signal.SIGTERM, signal.SIGINT))

    try:
        with tracing.exporting(component, settings):
            uvloop.run(main())
    except config.ConfigError as error:
        log.error("bad settings", error=str(error))
        raise SystemExit(2) from None
    except CredentialsRefused as error:
        log.error("credentials refused", error=str(error))
        _exit_now(1)
    except CannotListen as error:
        log.error("port not available", error=str(error), setting=settings.named(error.setting))
        _exit_now(1)
    except EngineDied as error:
        log.error("service failed", error=str(error))
        _exit_now(1)
    except Exception:
        log.exception("service failed")
        _exit_now(1)
    log.info("stopped")
    _exit_now(0)


def _exit_now(status: int) -> NoReturn:
    """Everything has been closed by now. What the interpreter would still do is run the teardown of
    native libraries, and a real engine's hangs there."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
