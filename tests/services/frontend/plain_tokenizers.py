"""Tokenizers as their library has them: what ours, which remember, are held against."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer


def settings_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """As in its tokenizer.json."""
    settings: dict[str, Any] = json.loads(tokenizer.to_str())
    return settings


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Its tokens of a text, without those that only begin or end one."""
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids
