"""The HTTP application, put together. What it stands on starts and ends in `main`."""

from __future__ import annotations

from functools import partial

from fastapi_offline import FastAPIOffline
from starlette.routing import Route
from starlette.types import ASGIApp

from services.frontend.openai.body import BodyReader
from services.frontend.openai.engine_endpoints import EngineEndpoints
from services.frontend.openai.error_answers import answer_errors
from services.frontend.openai.exchange import ExchangeRecorder
from services.frontend.openai.gate import AccessGate
from services.frontend.openai.own_routes import (
    health_routes,
    model_routes,
    stored_routes,
    token_routes,
)
from services.frontend.openai.page import PAGE_ASSETS, TITLE, openapi_page
from services.frontend.openai.shortcut import Shortcut
from services.frontend.openai.stored_responses import StoredResponses
from services.frontend.pipeline import Pipeline
from services.frontend.response_store import ResponseStore


def create_app(pipeline: Pipeline, store: ResponseStore | None = None) -> ASGIApp:
    """The application, to be served by any ASGI server. Without a store no responses are kept."""
    kept = None if store is None else StoredResponses(store)
    bodies = BodyReader(pipeline.settings)
    endpoints = EngineEndpoints(pipeline, bodies, kept).by_path()

    app = FastAPIOffline(
        title=TITLE, redoc_url=None, redirect_slashes=False, static_url=PAGE_ASSETS
    )
    app.openapi = partial(openapi_page, keeps_responses=store is not None)  # type: ignore[method-assign]
    # For what is not a POST, which the shortcut takes.
    app.router.routes += [
        Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()
    ]
    app.include_router(token_routes(pipeline, bodies))
    app.include_router(model_routes(pipeline))
    app.include_router(health_routes(pipeline))
    if kept is not None:
        app.include_router(stored_routes(pipeline, kept))
    answer_errors(app)

    served = Shortcut(app, endpoints)
    gated = served if pipeline.access.is_open else AccessGate(served, pipeline.access)
    return ExchangeRecorder(gated, pipeline)
