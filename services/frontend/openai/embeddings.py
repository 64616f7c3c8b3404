"""/v1/embeddings, which no worker serves: they all run models that generate text."""

from __future__ import annotations

from http import HTTPStatus

from services.frontend.openai.errors import ApiError


def embedding_model(fields: object) -> str:
    """The model that a request asks of. Raises ApiError when it names none."""
    name = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(name, str) or not name:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "Missing required parameter: 'model'",
            param="model",
            code="missing_required_parameter",
        )
    return name


def no_embeddings(model: str) -> ApiError:
    """What everyone is told about a model that is there."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The model '{model}' generates text and does not support embeddings",
        param="model",
        code="unsupported_model",
    )
