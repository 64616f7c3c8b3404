"""What a client hears of an exception."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from libs.common.errors import SwitchgearError
from services.frontend.anthropic.errors import error_response
from services.frontend.openai.errors import ApiError, api_error_of, internal_error
from services.frontend.openai.exchange import exchange_of
from services.frontend.watch import ClientLeft

_WHERE_TO_LOOK = "all URLs are at /docs, models at /v1/models"


def answer_errors(app: FastAPI) -> None:
    """Has the application answer whatever its routes raise, and what it has no route for."""

    # Starlette raises those that are neither of these two again, so that the server logs them.
    @app.exception_handler(ApiError)
    @app.exception_handler(SwitchgearError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return answer_to(error, request.scope)

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.scope['path'][:200]}"
        message, code = (
            (f"Method not allowed: {where}", "method_not_allowed")
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
            else (f"Unknown request URL: {where} ({_WHERE_TO_LOOK})", "unknown_url")
        )
        headers = dict(error.headers or {})
        refusal = ApiError(error.status_code, message, code=code, headers=headers)
        return error_response(refusal, request.scope)

    @app.exception_handler(ClientLeft)
    async def on_client_left(request: Request, error: ClientLeft) -> Response:
        return for_nobody()


def answer_to(error: Exception, scope: Scope) -> Response:
    """In the shape that the caller's API has for errors."""
    match error:
        case ApiError():
            return error_response(error, scope)
        case SwitchgearError():
            exchange_of(scope).failure = error
            return error_response(api_error_of(error), scope)
        case _:
            return error_response(internal_error(), scope)


def for_nobody() -> Response:
    """The client has left, and there is nobody to read it."""
    return Response(status_code=499)
