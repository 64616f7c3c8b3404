"""What a worker configures of its vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from libs.engine.interface import Leg

LEASE_MARGIN_SECONDS = 1.0
"""Covers what passes between vLLM starting a lease and a session being made from it, and the way
of the session to its puller, clocks being compared nowhere on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """One vLLM engine. None leaves a choice to the platform, or to vLLM and the model."""

    model: Path
    """A folder as Hugging Face publishes models."""
    leg: Leg
    """PREFILL keeps computed KV for others to pull; DECODE pulls, and serves whole requests too;
    WHOLE does without NIXL."""
    task: Literal["generate", "embed"] = "generate"
    """Any model that generates can embed, too: its answer is the last token's hidden state, unless
    the model's files say otherwise. With embed the leg is WHOLE."""
    dtype: str = "auto"
    block_size_tokens: int | None = None
    """32 on CPUs, where it must be a multiple of 32, and 16 elsewhere."""
    max_model_len_tokens: int | None = None
    kv_cache_bytes: int | None = None
    """On CPUs all of it is touched at start. None there is vLLM's share of the machine."""
    device_memory_fraction: float | None = None
    """Of a GPU's memory, for weights and KV together. None is vLLM's own, nearly all."""
    host_kv_bytes: int | None = None
    """Host memory to which computed KV is copied, and from which it is loaded again when the GPU
    has dropped it. None keeps none; on CPUs there is no such tier, and the start fails."""
    max_running_requests: int | None = None
    """64 on CPUs, vLLM's own choice elsewhere."""
    enforce_eager: bool | None = None
    """Whether not to compile the model: true on CPUs, where compiling takes a minute and gains
    little, and false elsewhere."""
    nixl_host: str = "127.0.0.1"
    """Where engines that pull from this one find it; must be an address of this host."""
    nixl_port: int = 0
    """0 takes any free one."""
    kv_lease_seconds: int = 30
    """How long computed KV waits to be pulled."""
    transfer_timeout_seconds: float = 5.0
    """A pull that takes longer, its handshake included, is given up and the prompt computed here.
    Prefill and decode engines must agree on it."""

    def __post_init__(self) -> None:
        if self.host_kv_bytes and self.task != "generate":
            raise ValueError(
                f"host_kv_bytes is for engines that generate, and the task is {self.task!r}"
            )
        if self.session_seconds <= 0:
            raise ValueError(
                f"kv_lease_seconds must exceed transfer_timeout_seconds by more than "
                f"{LEASE_MARGIN_SECONDS}, got {self.kv_lease_seconds} and "
                f"{self.transfer_timeout_seconds}"
            )

    @property
    def session_seconds(self) -> float:
        """How long after its computation KV may begin to be pulled: a pull that begins then and
        is not given up ends before vLLM frees the blocks."""
        return self.kv_lease_seconds - self.transfer_timeout_seconds - LEASE_MARGIN_SECONDS
