"""The HTTP application: routes, bodies, and errors in OpenAI's shape."""

from __future__ import annotations

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
from services.frontend.access import Caller
from services.frontend.core.model_table import KnownModel
from services.frontend.openai.body import BodyReader
from services.frontend.openai.errors import (
    ApiError,
    api_error_of,
    error_response,
    internal_error,
)
from services.frontend.openai.exchange import ExchangeRecorder, exchange_of
from services.frontend.openai.formats import ChatFormat, TextFormat
from services.frontend.openai.gate import AccessGate
from services.frontend.openai.generation import GenerationResponse
from services.frontend.openai.page import TITLE, openapi_page
from services.frontend.openai.routing_headers import routing_options
from services.frontend.openai.schema import ChatBody, CompletionBody, checked, parse
from services.frontend.openai.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from services.frontend.pipeline import Pipeline


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
    app = FastAPI(title=TITLE, redoc_url=None, redirect_slashes=False)
    app.openapi = openapi_page  # type: ignore[method-assign]
    bodies = BodyReader(pipeline.settings)

    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await bodies.json_of(request))
        _check_number("n", body.n, pipeline.settings.max_choices)
        return GenerationResponse(
            pipeline,
            body,
            [body.chat()],
            ChatFormat,
            traceparent=_traceparent(request),
            routing=routing_options(request.scope["headers"]),
        )

    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await bodies.json_of(request))
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

    # First, since routes are tried in order.
    app.router.routes[:0] = [
        Route("/v1/chat/completions", _Endpoint(chat_completions), methods=["POST"]),
        Route("/v1/completions", _Endpoint(completions), methods=["POST"]),
    ]

    @app.post("/tokenize")
    async def tokenize_(request: Request) -> Response:
        body = checked(TokenizeBody, await bodies.json_of(request))
        return _json(await tokenize(pipeline, _caller(request), body))

    @app.post("/detokenize")
    async def detokenize_(request: Request) -> Response:
        body = checked(DetokenizeBody, await bodies.json_of(request))
        return _json(await detokenize(pipeline, _caller(request), body))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        listed = [
            _model_object(name, model.facts, "")
            for model in pipeline.models.served()
            for name in (model.name, *model.facts.aliases)
            if _caller(request).may_use(name, model.name)
        ]
        return _json({"object": "list", "data": listed})

    # Names may have slashes.
    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        exchange_of(request.scope).model = pipeline.models.canonical_name(name)
        pipeline.check_allowed(_caller(request), name)
        facts, problem = pipeline.models.facts(name)
        return _json(_model_object(name, facts, problem))

    @app.get("/health")
    @app.get("/ready")
    async def ready() -> Response:
        if problem := pipeline.problem():
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                problem,
                code="not_ready",
                headers={"retry-after": "1"},
            )
        if not pipeline.access.is_open:
            return _json({"status": "ok"})
        return _json({"status": "ok", "models": [m.name for m in pipeline.models.served()]})

    @app.get("/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    if pipeline.access.is_open:
        # Elsewhere the metrics port has it: what all tenants do together is nobody's business.
        @app.get("/metrics")
        async def metrics() -> Response:
            text = generate_latest(pipeline.metrics.registry)
            return Response(text, media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    gated = app if pipeline.access.is_open else AccessGate(app, pipeline.access)
    return ExchangeRecorder(gated, pipeline.metrics)


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
        return error_response(error)

    @app.exception_handler(SwitchgearError)
    async def on_switchgear_error(request: Request, error: SwitchgearError) -> Response:
        return error_response(api_error_of(error))

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.scope['path'][:200]}"
        message, code = (
            (f"Method not allowed: {where}", "method_not_allowed")
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
            else (f"Unknown request URL: {where}", "unknown_url")
        )
        headers = dict(error.headers or {})
        return error_response(ApiError(error.status_code, message, code=code, headers=headers))

    @app.exception_handler(ClientDisconnect)
    async def on_client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # Nobody is there to read it.

    # Starlette raises the exception again afterwards, so that the server logs it.
    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(internal_error())


def _json(fields: dict[str, Any]) -> Response:
    return Response(orjson.dumps(fields), media_type="application/json")


def _model_object(name: str, facts: KnownModel, problem: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": facts.created_unix_seconds,
        "owned_by": "switchgear",
        "root": facts.name,
        "max_model_len": facts.context_length_tokens,
        "ready": not problem,
        "not_ready_reason": problem or None,
    }


def _caller(request: Request) -> Caller:
    return exchange_of(request.scope).caller


def _traceparent(request: Request) -> str:
    return request.headers.get("traceparent", "")
