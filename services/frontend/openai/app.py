"""The HTTP application: routes, bodies, and errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from libs.common.errors import SwitchgearError
from services.frontend.access import Caller
from services.frontend.anthropic import body as messages_body
from services.frontend.anthropic.body import MessagesBody, PromptBody
from services.frontend.anthropic.errors import error_response
from services.frontend.anthropic.messages import MessagesDialect, count_tokens
from services.frontend.core.model_table import KnownModel
from services.frontend.openai import embeddings as embeddings_body
from services.frontend.openai import responses_body
from services.frontend.openai.body import BodyReader
from services.frontend.openai.dialect import CHAT, TEXT, Dialect
from services.frontend.openai.embeddings import EmbeddingBody, EmbeddingResponse, PoolingBody
from services.frontend.openai.errors import (
    ApiError,
    api_error_of,
    internal_error,
)
from services.frontend.openai.exchange import ExchangeRecorder, exchange_of
from services.frontend.openai.gate import AccessGate
from services.frontend.openai.generation import GenerationResponse
from services.frontend.openai.page import TITLE, openapi_page
from services.frontend.openai.responses import ResponsesDialect
from services.frontend.openai.responses_body import ResponsesBody
from services.frontend.openai.routing_headers import routing_options
from services.frontend.openai.schema import ChatBody, CompletionBody, checked, parse
from services.frontend.openai.stored_responses import StoredResponses
from services.frontend.openai.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from services.frontend.pipeline import Pipeline, Prompt
from services.frontend.response_store import ResponseStore
from services.frontend.watch import ClientLeft


class _Endpoint:
    """An endpoint as an ASGI application of its own, which raises nothing but bugs."""

    def __init__(self, handle: Callable[[Request], Awaitable[Response]]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handle(Request(scope, receive))
            await response(scope, receive, send)
        except ClientLeft:
            await _for_nobody()(scope, receive, send)
        except Exception as error:
            await _answer_to(error, scope)(scope, receive, send)
            if not isinstance(error, ApiError | SwitchgearError):
                raise


class _Shortcut:
    """Takes requests that engines answer past FastAPI.

    Its handling of a request costs as much as a short answer, and these endpoints use none of it:
    they read their body in pieces and write their answer themselves.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, _Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"])
        app = self._app if endpoint is None or scope["method"] != "POST" else endpoint
        await app(scope, receive, send)


def create_app(pipeline: Pipeline, store: ResponseStore | None = None) -> ASGIApp:
    """The application, to be served by any ASGI server. Without a store no responses are kept."""
    app = FastAPI(title=TITLE, redoc_url=None, redirect_slashes=False)
    app.openapi = partial(openapi_page, keeps_responses=store is not None)  # type: ignore[method-assign]
    bodies = BodyReader(pipeline.settings)

    def generation(
        request: Request,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        dialect: Dialect,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> Response:
        return GenerationResponse(
            pipeline,
            body,
            prompts,
            dialect,
            routing=routing_options(exchange_of(request.scope).headers),
            before_end=before_end,
        )

    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await bodies.json_of(request))
        _check_number("n", body.n, pipeline.settings.max_choices)
        return generation(request, body, [body.chat()], CHAT)

    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await bodies.json_of(request))
        _check_number("prompt", len(body.prompt), pipeline.settings.max_prompts)
        _check_number("n", len(body.prompt) * body.n, pipeline.settings.max_choices)
        return generation(request, body, body.prompt, TEXT)

    async def responses(request: Request) -> Response:
        fields = await bodies.json_of(request)
        body = checked(
            ResponsesBody, fields, neutral=responses_body.NEUTRAL, ignored=responses_body.IGNORED
        )
        chat = body.chat()
        return generation(request, chat, [chat.chat()], ResponsesDialect(body))

    if store is not None:
        kept = StoredResponses(store)
        _serve_stored(app, pipeline, kept)

        async def kept_responses(request: Request) -> Response:
            fields = await bodies.json_of(request)
            response = await kept.begin(fields, _caller(request).tenant)
            chat = response.body.chat()
            return generation(request, chat, [chat.chat()], response.dialect, response.keep)

    async def messages(request: Request) -> Response:
        fields = await bodies.json_of(request)
        body = checked(
            MessagesBody, fields, neutral=messages_body.NEUTRAL, ignored=messages_body.IGNORED
        )
        chat = body.chat()
        dialect = MessagesDialect(exchange_of(request.scope).request_id)
        return generation(request, chat, [chat.chat()], dialect)

    async def pooled(request: Request, body: type[EmbeddingBody | PoolingBody]) -> Response:
        fields = await bodies.json_of(request)
        return EmbeddingResponse(
            pipeline,
            checked(
                body,
                fields,
                neutral=embeddings_body.NEUTRAL,
                ignored=embeddings_body.IGNORED,
            ),
            routing=routing_options(exchange_of(request.scope).headers),
        )

    async def embeddings(request: Request) -> Response:
        return await pooled(request, EmbeddingBody)

    async def pooling(request: Request) -> Response:
        return await pooled(request, PoolingBody)

    running = {
        "/v1/chat/completions": _Endpoint(chat_completions),
        "/v1/completions": _Endpoint(completions),
        "/v1/responses": _Endpoint(responses if store is None else kept_responses),
        "/v1/messages": _Endpoint(messages),
        "/v1/embeddings": _Endpoint(embeddings),
        "/pooling": _Endpoint(pooling),
    }
    # For what is not a POST.
    app.router.routes += [
        Route(path, endpoint, methods=["POST"]) for path, endpoint in running.items()
    ]

    @app.post("/v1/messages/count_tokens")
    async def count_tokens_(request: Request) -> Response:
        fields = await bodies.json_of(request)
        body = checked(
            PromptBody, fields, neutral=messages_body.NEUTRAL, ignored=messages_body.IGNORED
        )
        return _json(await count_tokens(pipeline, _caller(request), body))

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
    served = _Shortcut(app, running)
    gated = served if pipeline.access.is_open else AccessGate(served, pipeline.access)
    return ExchangeRecorder(gated, pipeline)


def _serve_stored(app: FastAPI, pipeline: Pipeline, kept: StoredResponses) -> None:
    """What can be done with responses that are kept."""
    path = "/v1/responses/{response_id}"

    @app.get(path)
    async def retrieve(response_id: str, request: Request) -> Response:
        query = request.query_params.multi_items()
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.retrieve(caller.tenant, response_id, query))

    @app.delete(path)
    async def delete(response_id: str, request: Request) -> Response:
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.delete(caller.tenant, response_id))

    @app.get(path + "/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        query = request.query_params.multi_items()
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.input_items(caller.tenant, response_id, query))

    @app.post(path + "/cancel")
    async def cancel(response_id: str, request: Request) -> Response:
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.cancel(caller.tenant, response_id))


def _check_number(param: str, number: int, limit: int) -> None:
    if number > limit:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{param}: at most {limit} {'choices' if param == 'n' else 'prompts'} in one request",
            param=param,
            code="invalid_value",
        )


def _answer_errors(app: FastAPI) -> None:
    # Starlette raises those that are neither of these two again, so that the server logs them.
    @app.exception_handler(ApiError)
    @app.exception_handler(SwitchgearError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return _answer_to(error, request.scope)

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.scope['path'][:200]}"
        message, code = (
            (f"Method not allowed: {where}", "method_not_allowed")
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
            else (f"Unknown request URL: {where}", "unknown_url")
        )
        headers = dict(error.headers or {})
        refusal = ApiError(error.status_code, message, code=code, headers=headers)
        return error_response(refusal, request.scope)

    @app.exception_handler(ClientLeft)
    async def on_client_left(request: Request, error: ClientLeft) -> Response:
        return _for_nobody()


def _answer_to(error: Exception, scope: Scope) -> Response:
    match error:
        case ApiError():
            return error_response(error, scope)
        case SwitchgearError():
            return error_response(api_error_of(error), scope)
        case _:
            return error_response(internal_error(), scope)


def _for_nobody() -> Response:
    """The client has left, and there is nobody to read it."""
    return Response(status_code=499)


def _json(fields: dict[str, Any]) -> Response:
    return Response(orjson.dumps(fields), media_type="application/json")


def _model_object(name: str, facts: KnownModel, problem: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": facts.created_unix_seconds,
        "owned_by": "switchgear",
        "root": facts.name,
        "task": "embed" if facts.pooling_tasks else "generate",
        "max_model_len": facts.context_length_tokens,
        "ready": not problem,
        "not_ready_reason": problem or None,
    }


def _caller(request: Request) -> Caller:
    return exchange_of(request.scope).caller
