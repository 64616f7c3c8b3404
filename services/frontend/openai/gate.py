"""Asks for an API key before anything else of a request is looked at."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from libs.common.errors import SwitchgearError
from services.frontend.access import Access
from services.frontend.anthropic.errors import error_response
from services.frontend.openai.errors import api_error_of
from services.frontend.openai.exchange import exchange_of
from services.frontend.openai.page import PAGE_ASSETS

_OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/openapi.json", "/docs"})
"""What probes and readers of the documentation ask for. It tells nothing about anyone's use."""


class AccessGate:
    """Between the recorder and the application, where API keys are asked for."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_open(scope["path"]):
            try:
                exchange = exchange_of(scope)
                exchange.caller = self._access.caller(_authorization(exchange.headers))
            except SwitchgearError as error:
                response = error_response(api_error_of(error), scope)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(f"{PAGE_ASSETS}/")


def _authorization(headers: Mapping[bytes, bytes]) -> str:
    """What OpenAI's clients send, or else Anthropic's key in the same form."""
    if (authorization := headers.get(b"authorization")) is not None:
        return authorization.decode("latin-1")
    key = headers.get(b"x-api-key")
    return "" if key is None else f"Bearer {key.decode('latin-1')}"
