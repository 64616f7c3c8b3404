"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from services.frontend.access import Caller
from services.frontend.chat_template import Chat
from services.frontend.openai.errors import ApiError
from services.frontend.openai.messages import ChatMessage, for_template
from services.frontend.pipeline import Pipeline, Prompt


class _TokensBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(default=None, min_length=1, max_length=256)
    """May be left out where there is one model only."""


class TokenizeBody(_TokensBody):
    """POST /tokenize: a text, or messages to put through the model's template."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    """Whether a text gets the special tokens that the model wants around one. Messages get those
    that the template writes."""
    add_generation_prompt: bool = True
    """Whether messages are followed by what opens the assistant's answer."""
    return_token_strs: bool = False

    def to_tokenise(self) -> Prompt:
        """Raises ApiError unless there is exactly one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "Exactly one of prompt and messages is required",
                param="prompt",
                code="invalid_value",
            )
        if self.messages is None:
            return self.prompt or ""
        return Chat(for_template(self.messages), begins_answer=self.add_generation_prompt)


class DetokenizeBody(_TokensBody):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**32)]]


async def tokenize(pipeline: Pipeline, caller: Caller, body: TokenizeBody) -> dict[str, Any]:
    """The answer to /tokenize."""
    with pipeline.admitted(caller):
        model = pipeline.model_for(caller, body.model or pipeline.only_model(caller))
        token_ids = await pipeline.tokenise(
            model, body.to_tokenise(), adds_special_tokens=body.add_special_tokens
        )
        return {
            "count": len(token_ids),
            "max_model_len": model.facts.context_length_tokens,
            "tokens": token_ids,
            "token_strs": model.tokenizer.pieces(token_ids) if body.return_token_strs else None,
        }


async def detokenize(pipeline: Pipeline, caller: Caller, body: DetokenizeBody) -> dict[str, Any]:
    """The answer to /detokenize."""
    with pipeline.admitted(caller):
        model = pipeline.model_for(caller, body.model or pipeline.only_model(caller))
        return {"prompt": await pipeline.detokenise(model, body.tokens)}
