"""The router's settings."""

from __future__ import annotations

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

    request_tokens: float = Field(default=256.0, ge=0, allow_inf_nan=False)
    """Price of each request that a worker already has. Higher: hot prefixes spread sooner."""

    stall_weight: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Price of a prompt token for each request that stands still while it is computed. Higher:
    steadier token gaps, longer waits for the first token."""

    overflow_weight: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    """Price of a token's KV beyond a worker's room. Higher: full workers are shunned more."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the cheapest worker; above, dearer ones get a chance, too."""

    min_remote_prefill_tokens: int = Field(default=256, ge=1)
    """Prompts with fewer uncached tokens are computed by the decode worker itself."""

    max_local_overlap: float = Field(default=0.8, gt=0, le=1)
    """Prompts of which the decode worker holds this fraction are computed there, too."""

    prefill_timeout_seconds: float = Field(default=30.0, gt=0)
    """Longest wait for a prefill worker before the decode worker computes the prompt itself."""

    overlap_timeout_seconds: float = Field(default=0.1, gt=0)
    """Longest wait for a KV indexer before a request is routed by load alone."""

    window_responses: int = Field(default=32, ge=1)
    """Messages a worker may have on their way before it waits for us and merges steps."""

    explained_decisions: int = Field(default=1000, ge=0)
    """Decisions that ExplainDecision remembers."""

    estimate_ttl_seconds: float = Field(default=120.0, gt=0)
    """How long a worker without KV events is believed to hold a prompt that it was given."""

    @property
    def policy(self) -> Policy:
        """The part that decisions depend on."""
        return Policy(
            prefill_policy=self.prefill_policy,
            decode_policy=self.decode_policy,
            prefill_weight=self.prefill_weight,
            decode_weight=self.decode_weight,
            request_tokens=self.request_tokens,
            stall_weight=self.stall_weight,
            overflow_weight=self.overflow_weight,
            temperature=self.temperature,
            min_remote_prefill_tokens=self.min_remote_prefill_tokens,
            max_local_overlap=self.max_local_overlap,
        )
