"""The way past FastAPI, for requests that engines answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from libs.common.errors import SwitchgearError
from services.frontend.openai.error_answers import answer_to, for_nobody
from services.frontend.openai.errors import ApiError
from services.frontend.watch import ClientLeft

Handler = Callable[[Request], Awaitable[Response]]


class Endpoint:
    """An endpoint as an ASGI application of its own, which raises nothing but bugs."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handle(Request(scope, receive))
            await response(scope, receive, send)
        except ClientLeft:
            await for_nobody()(scope, receive, send)
        except Exception as error:
            await answer_to(error, scope)(scope, receive, send)
            if not isinstance(error, ApiError | SwitchgearError):
                raise


class Shortcut:
    """Takes POSTs to some paths past the application.

    FastAPI's handling of a request costs as much as a short answer, and these endpoints use none of
    it: they read their body in pieces and write their answer themselves.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"])
        app = self._app if endpoint is None or scope["method"] != "POST" else endpoint
        await app(scope, receive, send)
