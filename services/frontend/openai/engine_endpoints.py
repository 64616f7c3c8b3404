"""Endpoints that engines answer: a body becomes a response that runs when it is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from services.frontend.anthropic import body as messages_body
from services.frontend.anthropic.body import MessagesBody
from services.frontend.anthropic.messages import MessagesDialect
from services.frontend.openai import embeddings as embeddings_body
from services.frontend.openai import responses_body
from services.frontend.openai.body import BodyReader
from services.frontend.openai.dialect import CHAT, TEXT, Dialect
from services.frontend.openai.embeddings import EmbeddingBody, EmbeddingResponse, PoolingBody
from services.frontend.openai.errors import ApiError
from services.frontend.openai.exchange import exchange_of
from services.frontend.openai.generation import GenerationResponse
from services.frontend.openai.responses import ResponsesDialect
from services.frontend.openai.responses_body import ResponsesBody, StoredResponsesBody
from services.frontend.openai.routing_headers import routing_options
from services.frontend.openai.schema import ChatBody, CompletionBody, checked, parse
from services.frontend.openai.shortcut import Endpoint
from services.frontend.openai.stored_responses import StoredResponses
from services.frontend.pipeline import Pipeline, Prompt


class EngineEndpoints:
    """Handlers, on one pipeline."""

    def __init__(
        self, pipeline: Pipeline, bodies: BodyReader, kept: StoredResponses | None
    ) -> None:
        """Without `kept` no responses are kept."""
        self._pipeline = pipeline
        self._bodies = bodies
        self._kept = kept

    def by_path(self) -> Mapping[str, Endpoint]:
        """All of them. Each is for POST."""
        handlers = {
            "/v1/chat/completions": self._chat_completions,
            "/v1/completions": self._completions,
            "/v1/responses": self._responses if self._kept is None else self._kept_responses,
            "/v1/messages": self._messages,
            "/v1/embeddings": self._embeddings,
            "/pooling": self._pooling,
        }
        return {path: Endpoint(handle) for path, handle in handlers.items()}

    async def _chat_completions(self, request: Request) -> Response:
        body = parse(ChatBody, await self._bodies.json_of(request))
        _check_number("n", body.n, self._pipeline.settings.max_choices)
        return self._generation(request, body, [body.chat()], CHAT)

    async def _completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._bodies.json_of(request))
        settings = self._pipeline.settings
        _check_number("prompt", len(body.prompt), settings.max_prompts)
        _check_number("n", len(body.prompt) * body.n, settings.max_choices)
        return self._generation(request, body, body.prompt, TEXT)

    async def _responses(self, request: Request) -> Response:
        fields = await self._bodies.json_of(request)
        body = checked(
            ResponsesBody, fields, neutral=responses_body.NEUTRAL, ignored=responses_body.IGNORED
        )
        chat = body.chat()
        return self._generation(request, chat, [chat.chat()], ResponsesDialect(body))

    async def _kept_responses(self, request: Request) -> Response:
        assert self._kept is not None
        fields = await self._bodies.json_of(request)
        neutral, ignored = responses_body.NEUTRAL_WITH_STORE, responses_body.IGNORED
        asked = checked(StoredResponsesBody, fields, neutral=neutral, ignored=ignored)
        caller = exchange_of(request.scope).caller
        with ExitStack() as place:
            # What goes on with a response reads it: not for who is over their limits.
            place.enter_context(self._pipeline.admitted(caller))
            response = await self._kept.begin(asked, caller.tenant)
            chat = response.body.chat()
            return self._generation(
                request,
                chat,
                [chat.chat()],
                response.dialect,
                before_end=response.keep,
                place=place.pop_all(),
            )

    async def _messages(self, request: Request) -> Response:
        fields = await self._bodies.json_of(request)
        body = checked(
            MessagesBody, fields, neutral=messages_body.NEUTRAL, ignored=messages_body.IGNORED
        )
        chat = body.chat()
        dialect = MessagesDialect(exchange_of(request.scope).request_id)
        return self._generation(request, chat, [chat.chat()], dialect)

    async def _embeddings(self, request: Request) -> Response:
        return await self._pooled(request, EmbeddingBody)

    async def _pooling(self, request: Request) -> Response:
        return await self._pooled(request, PoolingBody)

    async def _pooled(self, request: Request, body: type[EmbeddingBody | PoolingBody]) -> Response:
        fields = await self._bodies.json_of(request)
        neutral, ignored = embeddings_body.NEUTRAL, embeddings_body.IGNORED
        return EmbeddingResponse(
            self._pipeline,
            checked(body, fields, neutral=neutral, ignored=ignored),
            routing=routing_options(exchange_of(request.scope).headers),
        )

    def _generation(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        dialect: Dialect,
        *,
        before_end: Callable[[], Awaitable[None]] | None = None,
        place: ExitStack | None = None,
    ) -> Response:
        return GenerationResponse(
            self._pipeline,
            body,
            prompts,
            dialect,
            routing=routing_options(exchange_of(request.scope).headers),
            before_end=before_end,
            place=place,
        )


def _check_number(param: str, number: int, limit: int) -> None:
    if number > limit:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{param}: at most {limit} {'choices' if param == 'n' else 'prompts'} in one request",
            param=param,
            code="invalid_value",
        )
