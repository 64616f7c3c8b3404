"""Settings of the frontend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.common.config import NatsSettings


def _default_cache_folder() -> Path:
    return Path(os.environ.get("SWITCHGEAR_CACHE") or "~/.cache/switchgear").expanduser()


class FrontendSettings(NatsSettings):
    """The frontend: OpenAI's REST API and the public gRPC API."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_FRONTEND_")

    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of the REST API; several frontends on a host may share it. 0 takes a free one."""

    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Requests in progress beyond which new ones get 429."""

    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Largest request body; larger ones get 413. A token of prompt takes some 5 bytes."""

    max_buffered_body_bytes: int = Field(default=256 << 20, ge=1024)
    """Request bodies held at the same time while they are being received; beyond, 429."""

    body_timeout_seconds: float = Field(default=30.0, gt=0)
    """For a client to send its body; then it gets 408."""

    max_header_bytes: int = Field(default=64 << 10, ge=1024)
    """Largest request line and headers together; larger ones get 431."""

    header_timeout_seconds: float = Field(default=10.0, gt=0)
    """For a client to send its headers once it has begun; then it gets 408."""

    api_keys: str = "none"
    """Who may call: `none` asks for no API key; `etcd` has keys under config/frontend/keys/;
    anything else is the path of a file of keys. Keys are followed while the process runs."""

    allow_open_access: bool = False
    """Serve without API keys on an address that others can reach. Without it the process does not
    start with `host` other than loopback and `api_keys` none."""

    max_prompts: int = Field(default=16, ge=1)
    """Prompts in one completions call."""

    max_choices: int = Field(default=128, ge=1)
    """Choices in one answer: prompts times n. Each is a request to the workers."""

    max_parallel_inputs: int = Field(default=64, ge=1)
    """Inputs of one embeddings call that are with the workers at the same time. More finish a large
    call sooner and make others wait longer."""

    sse_keep_alive_seconds: float = Field(default=15.0, ge=0)
    """After so long without an event a stream gets a comment, so that no proxy takes it for dead; 0
    sends none. A stream that has nothing to say by then starts with one: its status is 200 from
    then on, and what fails later is told in an event."""

    request_timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest that a request may take, from its acceptance to its last token; then it gets 504."""

    max_attempts: int = Field(default=3, ge=1)
    """How often one request is run, the first time included, when workers are lost under it."""

    patience_seconds: float = Field(default=5.0, ge=0)
    """How long a request waits for a router when none is connected, and one that lost its worker
    for another worker. Longer hides longer restarts; shorter tells clients sooner."""

    session_window_responses: int = Field(default=2, ge=2)
    """Responses that a router may have on their way to this process. What comes while there are as
    many is put together into the next one: a process that is behind reads few large messages, each
    of which costs as much as a small one. More of them were 20 % slower with 512 streams, and no
    faster with fewer streams."""

    token_cache_bytes: int = Field(default=64 << 20, ge=0)
    """Texts that were tokenised, with their tokens, for each model: what comes again is looked up.
    The words of long texts take up to a third of that besides."""

    response_store: Literal["none", "nats"] = "none"
    """Where responses are kept for `previous_response_id` and `GET /v1/responses/ID`: `none` keeps
    nothing and refuses to; `nats` keeps them in a JetStream stream that all frontends share."""

    stored_responses_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """All responses that are kept; the oldest make room for new ones."""

    stored_responses: int = Field(default=100_000, ge=1)
    """How many are kept; the oldest make room for new ones."""

    stored_response_seconds: float = Field(default=30 * 86400.0, ge=1)
    """How long a response is kept. Default: 30 days, as OpenAI does."""

    stored_response_bytes: int = Field(default=1_000_000, ge=1024)
    """Largest response that is kept, its whole conversation included. NATS takes no more than its
    own `max_payload`, by default 1 MiB with headers."""

    trace_sample_ratio: float = Field(default=0.01, ge=0, le=1)
    """Of the requests whose callers send no traceparent, how many are traced. Those with one are
    traced exactly if it says so. Needs `otlp_endpoint`."""

    cache_folder: Path = Field(default_factory=_default_cache_folder)
    """Where tokenizers are kept between runs. Default: $SWITCHGEAR_CACHE or ~/.cache/switchgear."""
