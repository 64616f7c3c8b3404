"""Answers of POST /v1/responses, whole and as events."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson

from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.openai.errors import ApiError
from services.frontend.openai.formats import Answer
from services.frontend.openai.items import Item, ItemDialect, named_event
from services.frontend.openai.logprobs import chat_logprobs
from services.frontend.openai.responses_body import ResponsesBody

_ID_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponsesDialect(ItemDialect):
    """One response."""

    def __init__(
        self,
        body: ResponsesBody,
        *,
        is_kept: bool = False,
        previous_response_id: str | None = None,
    ) -> None:
        """`is_kept` is whether the response is kept, as far as that is known."""
        super().__init__()
        self.is_kept = is_kept
        self._previous_response_id = previous_response_id
        self._body = body
        self._ended: dict[str, Any] | None = None
        self._events = 0
        self._status = "in_progress"

    @property
    def id_prefix(self) -> str:
        return "resp"

    def begin(self) -> bytes:
        response = self._response()
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def open(self, item: Item) -> bytes:
        begun = self._item(item, "in_progress")
        if item.kind != "call":
            begun["content"] = []
        chunk = self._event("response.output_item.added", output_index=item.index, item=begun)
        if item.kind != "call":
            chunk += self._event(
                "response.content_part.added", **self._place(item), part=self._part(item)
            )
        return chunk

    def piece(self, item: Item, text: str, logprobs: Sequence[TokenLogprobs]) -> bytes:
        place = self._place(item)
        match item.kind:
            case "text":
                found = self._delta_logprobs(logprobs)
                return self._event(
                    "response.output_text.delta", **place, delta=text, logprobs=found
                )
            case "reasoning":
                return self._event("response.reasoning_text.delta", **place, delta=text)
            case "call":
                return self._event("response.function_call_arguments.delta", **place, delta=text)

    def close(self, item: Item, *, is_cut: bool) -> bytes:
        place, text = self._place(item), item.text
        match item.kind:
            case "text":
                found = self._delta_logprobs(item.logprobs)
                chunk = self._event("response.output_text.done", **place, text=text, logprobs=found)
            case "reasoning":
                chunk = self._event("response.reasoning_text.done", **place, text=text)
            case "call":
                chunk = self._event(
                    "response.function_call_arguments.done",
                    **place,
                    name=item.name,
                    arguments=text,
                )
        if item.kind != "call":
            chunk += self._event("response.content_part.done", **place, part=self._part(item))
        done = self._item(item, "incomplete" if is_cut else "completed")
        return chunk + self._event("response.output_item.done", output_index=item.index, item=done)

    def end_chunks(self, answer: Answer) -> bytes:
        response = self.finished()
        return self._event(f"response.{self._status}", response=response)

    def whole_answer(self, answer: Answer, choices: Sequence[dict[str, Any]]) -> bytes:
        return orjson.dumps(self.finished())

    def error_event(self, error: ApiError) -> bytes:
        """The error, and the response that failed with it."""
        chunk = self._event(
            "error", code=error.code or error.kind, message=error.message, param=error.param
        )
        if not self.is_begun:
            return chunk
        self._status = "failed"
        is_busy = error.status == HTTPStatus.TOO_MANY_REQUESTS
        code = "rate_limit_exceeded" if is_busy else "server_error"
        failure = {"code": code, "message": error.message}
        return chunk + self._event(
            "response.failed", response=self._response() | {"error": failure}
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        return named_event({"type": kind, "sequence_number": number, **fields})

    def _id(self, item: Item) -> str:
        own = self.answer.answer_id.partition("-")[2]
        return f"{_ID_PREFIXES[item.kind]}_{own}{item.index:02x}"

    def _place(self, item: Item) -> dict[str, Any]:
        place = {"item_id": self._id(item), "output_index": item.index}
        return place if item.kind == "call" else place | {"content_index": 0}

    def _part(self, item: Item) -> dict[str, Any]:
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": item.text}
        found = chat_logprobs(item.logprobs, self.answer.model.tokenizer)["content"]
        return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": found}

    def _delta_logprobs(self, found: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """As events have them: without the bytes."""
        listed = chat_logprobs(found, self.answer.model.tokenizer)["content"]
        for token in listed:
            for entry in (token, *token["top_logprobs"]):
                del entry["bytes"]
        return listed  # type: ignore[no-any-return]

    def _item(self, item: Item, status: str) -> dict[str, Any]:
        head = {"id": self._id(item), "status": status}
        match item.kind:
            case "text":
                content = [self._part(item)]
                return {"type": "message", **head, "role": "assistant", "content": content}
            case "reasoning":
                return {"type": "reasoning", **head, "summary": [], "content": [self._part(item)]}
            case "call":
                called = {"call_id": item.call_id, "name": item.name, "arguments": item.text}
                return {"type": "function_call", **head, **called}

    def finished(self) -> dict[str, Any]:
        """The response once its last item is complete."""
        if self._ended is None:
            self._status = "incomplete" if self.is_cut else "completed"
            self._ended = self._response() | {"usage": self._usage()}
        return self._ended | {"store": self.is_kept}

    def _usage(self) -> dict[str, Any]:
        usage = self.answer.usage()
        reasoning = "".join(item.text for item in self.items if item.kind == "reasoning")
        tokenizer = self.answer.model.tokenizer
        # Without its marks, which belong to nobody.
        reasoning_tokens = len(tokenizer.encode(reasoning, adds_special_tokens=False))
        cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": min(reasoning_tokens, usage["completion_tokens"])
            },
            "total_tokens": usage["total_tokens"],
        }

    def _response(self) -> dict[str, Any]:
        body, is_cut = self._body, self._status == "incomplete"
        output = []
        if self._status != "in_progress":
            output = [self._item(item, "completed") for item in self.items]
        if output and self._status in ("incomplete", "failed"):
            output[-1]["status"] = "incomplete"
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        if isinstance(schema := text.get("format", {}).get("schema"), str):
            text["format"]["schema"] = orjson.loads(schema)
        return {
            "id": self.answer.answer_id,
            "object": "response",
            "created_at": self.answer.created,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.answer.model.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": self._previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": self.is_kept,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": body.chosen_tool,
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "metadata": body.metadata,
            **({"user": body.user} if body.user is not None else {}),
        }
