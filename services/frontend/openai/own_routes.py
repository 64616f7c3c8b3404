"""Routes that the frontend answers by itself, in groups."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from libs.common.errors import NoLiveInstance
from services.frontend.access import Caller
from services.frontend.anthropic import body as messages_body
from services.frontend.anthropic.body import PromptBody
from services.frontend.anthropic.messages import count_tokens
from services.frontend.core.model_table import KnownModel
from services.frontend.openai.body import BodyReader
from services.frontend.openai.errors import api_error_of
from services.frontend.openai.exchange import exchange_of
from services.frontend.openai.schema import checked
from services.frontend.openai.stored_responses import StoredResponses
from services.frontend.openai.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize
from services.frontend.pipeline import Pipeline


def token_routes(pipeline: Pipeline, bodies: BodyReader) -> APIRouter:
    """What a text is in tokens, and the reverse."""
    routes = APIRouter()

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens_(request: Request) -> Response:
        fields = await bodies.json_of(request)
        body = checked(
            PromptBody, fields, neutral=messages_body.NEUTRAL, ignored=messages_body.IGNORED
        )
        return _json(await count_tokens(pipeline, _caller(request), body))

    @routes.post("/tokenize")
    async def tokenize_(request: Request) -> Response:
        body = checked(TokenizeBody, await bodies.json_of(request))
        return _json(await tokenize(pipeline, _caller(request), body))

    @routes.post("/detokenize")
    async def detokenize_(request: Request) -> Response:
        body = checked(DetokenizeBody, await bodies.json_of(request))
        return _json(await detokenize(pipeline, _caller(request), body))

    return routes


def model_routes(pipeline: Pipeline) -> APIRouter:
    """What can be asked for."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        listed = [
            _model_object(name, model.facts, "")
            for model in pipeline.models.served()
            for name in (model.name, *model.facts.aliases)
            if _caller(request).may_use(name, model.name)
        ]
        return _json({"object": "list", "data": listed})

    # Names may have slashes.
    @routes.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        exchange_of(request.scope).model = pipeline.models.canonical_name(name)
        pipeline.check_allowed(_caller(request), name)
        facts, problem = pipeline.models.facts(name)
        return _json(_model_object(name, facts, problem))

    return routes


def stored_routes(pipeline: Pipeline, kept: StoredResponses) -> APIRouter:
    """What can be done with responses that are kept."""
    routes = APIRouter()
    path = "/v1/responses/{response_id}"

    @routes.get(path)
    async def retrieve(response_id: str, request: Request) -> Response:
        query = request.query_params.multi_items()
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.retrieve(caller.tenant, response_id, query))

    @routes.delete(path)
    async def delete(response_id: str, request: Request) -> Response:
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.delete(caller.tenant, response_id))

    @routes.get(path + "/input_items")
    async def input_items(response_id: str, request: Request) -> Response:
        query = request.query_params.multi_items()
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.input_items(caller.tenant, response_id, query))

    @routes.post(path + "/cancel")
    async def cancel(response_id: str, request: Request) -> Response:
        caller = _caller(request)
        with pipeline.admitted(caller):
            return _json(await kept.cancel(caller.tenant, response_id))

    return routes


def health_routes(pipeline: Pipeline) -> APIRouter:
    """What those ask who watch over this process."""
    routes = APIRouter()

    @routes.get("/health")
    @routes.get("/ready")
    async def ready() -> Response:
        if problem := pipeline.problem():
            # Not the error itself, which would be logged for each probe.
            raise api_error_of(NoLiveInstance(problem))
        if not pipeline.access.is_open:
            return _json({"status": "ok"})
        return _json({"status": "ok", "models": [m.name for m in pipeline.models.served()]})

    @routes.get("/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    if pipeline.access.is_open:
        # Elsewhere the metrics port has it: what all tenants do together is nobody's business.
        @routes.get("/metrics")
        async def metrics() -> Response:
            text = generate_latest(pipeline.metrics.registry)
            return Response(text, media_type=CONTENT_TYPE_LATEST)

    return routes


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
