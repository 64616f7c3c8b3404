"""What all parts of a request body have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Takes no value of another type and no unknown field, so that no mistake goes unnoticed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
