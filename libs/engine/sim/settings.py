"""What a simulated engine pretends to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from libs.engine.sim.core import timing
from libs.engine.sim.core.scheduler import SchedulerLimits
from libs.engine.sim.core.timing import TimingModel
from libs.engine.sim.core.tokens import TokenSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSettings:
    """Raises ValueError, naming the setting, for values that make no sense."""

    timing: Literal["default", "fixed", "dynamo_mocker"] = "default"
    """See core/timing.py. With dynamo_mocker, chunk_tokens=8192 is the like of the original."""
    step_ms: float = 6.0
    """Of every step that decodes, with timing "fixed"."""
    block_size_tokens: int = 16
    kv_cache_tokens: int = 524_288
    context_length_tokens: int = 131_072
    chunk_tokens: int = 2_048
    """Computed in one step at most. Larger ones finish prompts sooner and hold up decoding."""
    max_running_requests: int = 256
    vocabulary: Sequence[int] = range(1_000, 5_000)
    """Token ids to draw from."""
    eos_token_id: int | None = None
    eos_probability: float = 0.0
    """Of any token to be eos_token_id; 0 ends sequences by length and stop tokens alone."""
    kv_bytes_per_token: int = 131_072
    transfer_bytes_per_second: float = 10e9
    """Of each transfer, however many there are at once."""
    transfer_timeout_seconds: float = 5.0
    """A transfer that takes longer is given up and the prompt computed instead."""
    kv_lease_seconds: float = 30.0
    """How long a computed prompt waits to be pulled."""
    transfer_host: str = "127.0.0.1"
    """Bound, and told to other engines; never a wildcard."""
    transfer_port: int = 0
    """0 is any free one."""
    embedding_dimensions: int = 0
    """Length of the vectors that it embeds prompts into; 0 generates."""
    host_kv_bytes: int = 0
    """Host memory for blocks that the device evicts; 0 keeps none."""
    host_bytes_per_second: float = 20e9
    """Of loads from there, which come one after another. What PCIe 4.0 with 16 lanes gives: a token
    is loaded in a twentieth of the time that computing it takes by default."""

    def __post_init__(self) -> None:
        for name in (
            "block_size_tokens",
            "context_length_tokens",
            "max_running_requests",
            "transfer_bytes_per_second",
            "transfer_timeout_seconds",
            "kv_lease_seconds",
            "host_bytes_per_second",
        ):
            self._require(name, getattr(self, name) > 0, "be above 0")
        for name in ("step_ms", "kv_bytes_per_token", "embedding_dimensions"):
            self._require(name, getattr(self, name) >= 0, "be 0 or more")
        self._require(
            "kv_cache_tokens", self.kv_cache_tokens >= self.block_size_tokens, "hold a block"
        )
        self._require(
            "host_kv_bytes",
            not self.host_kv_bytes or self.host_kv_bytes >= self.block_bytes > 0,
            f"be 0 or hold a block of {self.block_bytes} bytes",
        )
        self._require(
            "chunk_tokens",
            self.chunk_tokens >= self.max_running_requests,
            "be max_running_requests or more",
        )
        self._require("vocabulary", len(self.vocabulary) > 0, "not be empty")
        self._require("eos_probability", 0 <= self.eos_probability <= 1, "be 0 to 1")
        self._require(
            "eos_token_id",
            self.eos_token_id is not None or not self.eos_probability,
            "be given with eos_probability",
        )
        self._require(
            "transfer_host", self.transfer_host not in ("", "0.0.0.0", "::"), "be one address"
        )

    def _require(self, name: str, is_good: bool, must: str) -> None:
        if not is_good:
            raise ValueError(f"{name} must {must}, got {getattr(self, name)!r}")

    @property
    def block_bytes(self) -> int:
        return self.block_size_tokens * self.kv_bytes_per_token

    @property
    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            block_size_tokens=self.block_size_tokens,
            total_kv_blocks=self.kv_cache_tokens // self.block_size_tokens,
            context_length_tokens=self.context_length_tokens,
            max_running_requests=self.max_running_requests,
            chunk_tokens=self.chunk_tokens,
            kv_lease_seconds=self.kv_lease_seconds,
            embedding_dimensions=self.embedding_dimensions,
            host_kv_blocks=self.host_kv_bytes // self.block_bytes if self.host_kv_bytes else 0,
            host_load_seconds_per_block=self.block_bytes / self.host_bytes_per_second,
        )

    @property
    def timing_model(self) -> TimingModel:
        match self.timing:
            case "default":
                return timing.default
            case "fixed":
                return timing.fixed(self.step_ms)
            case "dynamo_mocker":
                return timing.dynamo_mocker

    @property
    def token_source(self) -> TokenSource:
        return TokenSource(
            self.vocabulary,
            eos_token_id=self.eos_token_id,
            eos_probability=self.eos_probability,
        )
