"""The router's settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from libs.common.config import ServiceSettings
from services.router.core.decision import Policy
from services.router.core.policies import KV, POLICIES


def known_policy(name: str) -> str:
    """The name of a policy that there is. Raises ValueError, naming those."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    return name


PolicyName = Annotated[str, AfterValidator(known_policy)]


POLICY_SETTINGS = tuple(field.name for field in fields(Policy))
"""Those that decisions depend on; they have the same names in both."""


class RouterSettings(ServiceSettings):
    """Picks the workers for each request and relays their tokens."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_ROUTER_")

    prefill_policy: PolicyName = KV
    """How prefill workers are chosen."""

    decode_policy: PolicyName = KV
    """How decode workers are chosen."""

    prefill_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Price of a prompt token to compute. Higher: more cache reuse, less even load."""

    decode_weight: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Price of a token's KV held while decoding. Higher: more even load, less cache reuse."""

    request_tokens: float = Field(default=128.0, ge=0, allow_inf_nan=False)
    """Price of each request that a worker already has. Higher: hot prefixes spread sooner."""

    stall_weight: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Price of a prompt token for each request that stands still while it is computed. Higher:
    steadier token gaps, longer waits for the first token."""

    overflow_weight: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    """Price of a token's KV beyond a worker's room. Higher: full workers are shunned more."""

    session_tokens: float = Field(default=1024.0, ge=0, allow_inf_nan=False)
    """Prompt tokens that keeping a session on its worker is worth. Higher: it yields less to
    load."""

    host_credit: float = Field(default=0.75, ge=0, le=1)
    """What a prompt token in a worker's host memory saves of computing it. Higher: conversations
    go back to where they must be loaded sooner than to where they must be computed."""

    disk_credit: float = Field(default=0.25, ge=0, le=1)
    """Likewise of one on its disk."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the cheapest worker; above, dearer ones get a chance, too."""

    min_remote_prefill_tokens: int = Field(default=256, ge=1)
    """Prompts with fewer uncached tokens are computed by the decode worker itself."""

    max_local_overlap: float = Field(default=0.8, gt=0, le=1)
    """Prompts of which the decode worker holds this fraction are computed there, too."""

    prefill_timeout_seconds: float = Field(default=30.0, gt=0)
    """Longest wait for a prefill worker before the decode worker computes the prompt itself."""

    max_held_seconds: float = Field(default=20.0, ge=0)
    """Longest wait in the router for room at a decode worker; then a request waits there. 0: never
    in the router."""

    overlap_timeout_seconds: float = Field(default=0.1, gt=0)
    """Longest wait for a KV indexer before a request is routed by load alone."""

    window_responses: int = Field(default=32, ge=1)
    """Messages a worker may have on their way before it waits for us and merges steps."""

    explained_decisions: int = Field(default=1000, ge=0)
    """Decisions that ExplainDecision remembers."""

    estimate_ttl_seconds: float = Field(default=120.0, gt=0)
    """How long a worker without KV events is believed to hold a prompt that it was given."""

    session_ttl_seconds: float = Field(default=600.0, gt=0)
    """How long after its last request a session has a worker that it is kept on."""

    @property
    def policy(self) -> Policy:
        """The part that decisions depend on."""
        return Policy(**{name: getattr(self, name) for name in POLICY_SETTINGS})
