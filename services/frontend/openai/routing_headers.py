"""Headers by which a caller steers routing. OpenAI's bodies have no room for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

from services.frontend.openai.errors import ApiError
from switchgear.common.v1 import routing_pb2

POLICY = "x-switchgear-policy"
TEMPERATURE = "x-switchgear-routing-temperature"
PIN = "x-switchgear-pin"
EXCLUDE = "x-switchgear-exclude"
SESSION_ID = "x-switchgear-session-id"

_NAMES = (POLICY, TEMPERATURE, PIN, EXCLUDE, SESSION_ID)
MAX_CHARACTERS = 1024


def routing_options(
    headers: Mapping[bytes, bytes],
) -> routing_pb2.RoutingOptions | None:
    """What the request asks of routing; None when it asks for nothing, as nearly all do.

    Raises ApiError, naming the header.
    """
    raw = {name: value for name, value in headers.items() if name.startswith(b"x-switchgear-")}
    if not raw:
        return None
    given = {
        name: raw[name.encode()].decode("latin-1").strip()
        for name in _NAMES
        if name.encode() in raw
    }
    if not given:
        return None
    for name, value in given.items():
        if not value or len(value) > MAX_CHARACTERS:
            raise _bad(name, f"must have 1 to {MAX_CHARACTERS} characters")
    return routing_pb2.RoutingOptions(
        policy=given.get(POLICY, ""),
        temperature=_temperature(given.get(TEMPERATURE)),
        pinned_workers=_listed(given.get(PIN, "")),
        excluded_workers=_listed(given.get(EXCLUDE, "")),
        session_id=given.get(SESSION_ID, ""),
    )


def _temperature(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise _bad(TEMPERATURE, f"must be a number of at least 0, not {value!r}")
    return number


def _listed(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _bad(name: str, problem: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"{name} {problem}", param=name, code="invalid_value")
