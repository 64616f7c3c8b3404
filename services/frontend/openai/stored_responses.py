"""Responses that outlive their request: going on with one, and reading and deleting it.

What is kept of a response is its answer and all that it was given, earlier responses included, as
items. A response is its tenant's: to others it is as unknown as one that never was.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson

from libs.common import logs
from libs.common.errors import InvalidRequest, ResponsesUnavailable
from services.frontend.openai.errors import ApiError
from services.frontend.openai.responses import ResponsesDialect
from services.frontend.openai.responses_body import (
    Item,
    ResponsesBody,
    StoredResponsesBody,
    items_of,
)
from services.frontend.response_store import ResponseStore

log = logs.get(__name__)

DEFAULT_PAGE_ITEMS = 20
MAX_PAGE_ITEMS = 100

_ENVELOPE_BYTES = 30
"""Of a stored value, around the response and its input."""


class StoredResponse:
    """One response that is made where responses are kept."""

    def __init__(
        self, store: ResponseStore, tenant: str, asked: StoredResponsesBody, body: ResponsesBody
    ) -> None:
        """`body` is what was asked with the whole conversation as its input."""
        self.body = body
        self._store = store
        self._tenant = tenant
        self._is_kept = asked.store is not False
        self._input = orjson.dumps(_resources(body.input)) if self._is_kept else b""
        self.dialect = ResponsesDialect(
            body, is_kept=self._is_kept, previous_response_id=asked.previous_response_id
        )

    @property
    def input_bytes(self) -> int:
        """What is to be kept before there is any answer; 0 where nothing is."""
        return len(self._input)

    async def keep(self) -> None:
        """Keeps the response, which is complete. Where that can't be done any more the answer says
        so: it has been paid for, and is worth more than an error."""
        if not self._is_kept:
            return
        dialect = self.dialect
        response = orjson.dumps(dialect.finished())
        value = b'{"response":%b,"input":%b}' % (response, self._input)
        dialect.is_kept = len(value) <= self._store.limits.response_bytes
        response_id = dialect.answer.answer_id
        if dialect.is_kept:
            try:
                await self._store.put(self._tenant, response_id, value)
            except ResponsesUnavailable:
                dialect.is_kept = False
        if not dialect.is_kept:
            log.warning("response not kept", response_id=response_id, value_bytes=len(value))


class StoredResponses:
    """The endpoints' work, on one store."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def begin(self, asked: StoredResponsesBody, tenant: str) -> StoredResponse:
        """A response to a body. Who asks for it to be kept hears before any work is spent when it
        can't be; who says nothing about it gets an answer all the same.

        Raises ApiError, InvalidRequest for what is too large to be kept, and ResponsesUnavailable.
        """
        body: ResponsesBody = asked
        if asked.previous_response_id is not None:
            earlier = await self._conversation(tenant, asked.previous_response_id)
            body = asked.model_copy(update={"input": earlier + asked.input})
        response = StoredResponse(self._store, tenant, asked, body)
        if asked.store:
            limit = self._store.limits.response_bytes
            if response.input_bytes + _ENVELOPE_BYTES > limit:
                raise InvalidRequest(
                    f"the conversation is larger than the {limit} bytes that can be stored of one",
                    param="store",
                )
            if asked.previous_response_id is None:
                await self._store.check()
        return response

    async def retrieve(self, tenant: str, response_id: str, query: _Query) -> dict[str, Any]:
        """The response as it was answered. Raises ApiError."""
        _check_query(query, {"include_obfuscation"}, {"stream": "false"}, {"starting_after"})
        response: dict[str, Any] = (await self._stored(tenant, response_id))["response"]
        return response

    async def delete(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Raises ApiError."""
        if not await self._store.delete(tenant, response_id):
            raise _unknown(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(self, tenant: str, response_id: str, query: _Query) -> dict[str, Any]:
        """A page of what the response was given. Raises ApiError."""
        _check_query(query, {"limit", "order", "after"}, {}, set())
        given = dict(query)
        limit = _limit(given.get("limit", str(DEFAULT_PAGE_ITEMS)))
        order = given.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _bad("order", "must be 'asc' or 'desc'")
        items = (await self._stored(tenant, response_id))["input"]
        return page_of(items, limit=limit, is_ascending=order == "asc", after=given.get("after"))

    async def cancel(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Always raises ApiError: who can ask for it has the whole answer."""
        await self._stored(tenant, response_id)
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "Only responses that are made in the background can be cancelled, which is not offered",
            code="unsupported_operation",
        )

    async def _conversation(self, tenant: str, response_id: str) -> list[Item]:
        """All that a response was given, and what it answered."""
        value = await self._store.get(tenant, response_id)
        if value is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"Previous response with id '{response_id[:100]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        stored = orjson.loads(value)
        return items_of(stored["input"] + stored["response"]["output"])

    async def _stored(self, tenant: str, response_id: str) -> dict[str, Any]:
        value = await self._store.get(tenant, response_id)
        if value is None:
            raise _unknown(response_id)
        found: dict[str, Any] = orjson.loads(value)
        return found


def page_of(
    items: Sequence[dict[str, Any]], *, limit: int, is_ascending: bool, after: str | None
) -> dict[str, Any]:
    """Up to `limit` items that follow the one with the id `after`. Raises ApiError for an id that
    no item has."""
    ordered = list(items if is_ascending else reversed(items))
    begin = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise _bad("after", f"there is no item with the id '{after[:100]}'")
        begin = ids.index(after) + 1
    data = ordered[begin : begin + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": begin + limit < len(ordered),
    }


_Query = Sequence[tuple[str, str]]
"""Parameters as they came, which may be repeated."""

_INCLUDABLE = frozenset({"message.output_text.logprobs", "reasoning.encrypted_content"})
"""What can be asked for and makes no difference: all there is is told."""


def _check_query(
    query: _Query, known: set[str], neutral: Mapping[str, str], unoffered: set[str]
) -> None:
    for name, value in query:
        if name in ("include", "include[]"):
            if value not in _INCLUDABLE:
                raise _bad("include", f"'{value[:100]}' is not supported")
        elif name in unoffered or (name in neutral and value != neutral[name]):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{name} is not supported with this value",
                param=name,
                code="unsupported_parameter",
            )
        elif name not in known and name not in neutral:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"Unrecognized request argument supplied: {name[:100]}",
                param=name[:100],
                code="unknown_parameter",
            )


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= MAX_PAGE_ITEMS:
        raise _bad("limit", f"must be in 1 to {MAX_PAGE_ITEMS}")
    return int(text[:9])


def _resources(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as they are kept and told of. One that came without an id gets one; where two came
    with the same the later does, so that a page can begin after either."""
    resources = []
    known: set[str] = set()
    for item in items:
        item_id = item.id
        if not item_id or item_id in known:
            item_id = f"{item.id_prefix}_{random.getrandbits(128):032x}"
        known.add(item_id)
        status = item.status if item.status in ("incomplete", "in_progress") else "completed"
        resources.append({"id": item_id, "status": status, **item.resource()})
    return resources


def _bad(param: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {why}", param=param, code="invalid_value")


def _unknown(response_id: str) -> ApiError:
    return ApiError(HTTPStatus.NOT_FOUND, f"Response with id '{response_id[:100]}' not found.")
