"""The HTTP application: routes, bodies, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from libs.common.errors import SwitchgearError
from services.frontend.chat_template import Chat
from services.frontend.models import ServedModel
from services.frontend.openai.errors import ApiError, api_error_of, internal_error
from services.frontend.openai.exchange import ExchangeRecorder, exchange_of
from services.frontend.openai.formats import ChatFormat, TextFormat
from services.frontend.openai.generation import GenerationResponse
from services.frontend.openai.routing_headers import routing_options
from services.frontend.openai.schema import ChatBody, CompletionBody, parse
from services.frontend.pipeline import Pipeline

BODY_SECONDS = 30
"""For a client to send its body."""


class _Endpoint:
    """An endpoint as an ASGI application of its own.

    FastAPI's handling of a request costs as much as a short answer, and these endpoints use none of
    it: they read their body in pieces and write their answer themselves.
    """

    def __init__(self, handle: Callable[[Request], Awaitable[Response]]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handle(Request(scope, receive))
        await response(scope, receive, send)


def create_app(pipeline: Pipeline) -> ASGIApp:
    """The application, to be served by any ASGI server."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)

    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await _json_of(request, pipeline))
        _check_number("n", body.n, pipeline.settings.max_choices)
        chat = Chat([message.for_template() for message in body.messages])
        return GenerationResponse(
            pipeline,
            body,
            [chat],
            ChatFormat,
            traceparent=_traceparent(request),
            routing=routing_options(request.scope["headers"]),
        )

    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await _json_of(request, pipeline))
        _check_number("prompt", len(body.prompt), pipeline.settings.max_prompts)
        _check_number("n", len(body.prompt) * body.n, pipeline.settings.max_choices)
        return GenerationResponse(
            pipeline,
            body,
            body.prompt,
            TextFormat,
            traceparent=_traceparent(request),
            routing=routing_options(request.scope["headers"]),
        )

    app.router.routes += [
        Route("/v1/chat/completions", _Endpoint(chat_completions), methods=["POST"]),
        Route("/v1/completions", _Endpoint(completions), methods=["POST"]),
    ]

    @app.get("/v1/models")
    async def models() -> Response:
        listed = [
            _model_object(name, model)
            for model in pipeline.models.served()
            for name in (model.name, *model.facts.aliases)
        ]
        return _json({"object": "list", "data": listed})

    # Names may have slashes.
    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        exchange_of(request.scope).model = pipeline.models.canonical_name(name)
        return _json(_model_object(name, pipeline.models.get(name)))

    @app.get("/health")
    async def health() -> Response:
        if problem := pipeline.problem():
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                problem,
                code="not_ready",
                headers={"retry-after": "1"},
            )
        return _json({"status": "ok", "models": [m.name for m in pipeline.models.served()]})

    @app.get("/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(pipeline.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    return ExchangeRecorder(app, pipeline.metrics)


def _check_number(param: str, number: int, limit: int) -> None:
    if number > limit:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{param}: at most {limit} {'choices' if param == 'n' else 'prompts'} in one request",
            param=param,
            code="invalid_value",
        )


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(SwitchgearError)
    async def on_switchgear_error(request: Request, error: SwitchgearError) -> Response:
        return _error(api_error_of(error))

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        message, code = (
            (f"Method not allowed: {where}", "method_not_allowed")
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
            else (f"Unknown request URL: {where}", "unknown_url")
        )
        headers = dict(error.headers or {})
        return _error(ApiError(error.status_code, message, code=code, headers=headers))

    @app.exception_handler(ClientDisconnect)
    async def on_client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # Nobody is there to read it.

    # Starlette raises the exception again afterwards, so that the server logs it.
    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return _error(internal_error())


def _error(error: ApiError) -> Response:
    return Response(error.body, error.status, headers=error.headers, media_type="application/json")


def _json(fields: dict[str, Any]) -> Response:
    return Response(orjson.dumps(fields), media_type="application/json")


def _model_object(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.facts.created_unix_seconds,
        "owned_by": "switchgear",
        "root": model.name,
        "max_model_len": model.facts.context_length_tokens,
    }


def _traceparent(request: Request) -> str:
    return request.headers.get("traceparent", "")


async def _json_of(request: Request, pipeline: Pipeline) -> object:
    """The body. Raises ApiError when it is too large, too slow, or not JSON."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type must be application/json, not {content_type[:100]!r}",
            code="unsupported_media_type",
        )
    limit_bytes = pipeline.settings.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise _too_large(limit_bytes)
    except TimeoutError:
        raise ApiError(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body did not arrive within {BODY_SECONDS} s",
            headers={"connection": "close"},
        ) from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {error}", code="invalid_json"
        ) from None


def _too_large(limit_bytes: int) -> ApiError:
    # The server reads on and drops the rest: were the connection closed instead, the client would
    # see a reset and not this.
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The body is larger than {limit_bytes} bytes",
        code="request_too_large",
    )
