"""Settings that prefill and decode workers share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from libs.common.config import NatsSettings


class WorkerSettings(NatsSettings):
    """One engine and how it is offered."""

    engine: Literal["vllm", "sim"] = "vllm"
    """vllm runs the model; sim keeps the books and the time of an engine without computing."""

    model: Path
    """Folder with the model in Hugging Face's format. The simulator reads only its tokenizer."""

    served_model_name: str = ""
    """Name that clients use. Default: the folder's name."""

    model_aliases: list[str] = Field(default_factory=list)
    """Other names for it."""

    tool_parser: str = Field(default="auto", pattern=r"^[a-z0-9_]{1,32}$")
    """How the model writes tool calls, of docs/formats.md; auto goes by its template and tokenizer,
    none turns tools off."""

    reasoning_parser: str = Field(default="auto", pattern=r"^[a-z0-9_]{1,32}$")
    """How the model writes reasoning, in the same way; with none it is part of the text."""

    task: Literal["generate", "embed"] = "generate"
    """What it does with prompts: generates, or embeds them, which decode workers can. Engines do
    one of the two, and so do all workers of a model."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of weights and KV; auto takes the model's own."""

    block_size_tokens: int = Field(default=0, ge=0)
    """Tokens per KV block; 0 takes the engine's default. All workers of a model must agree."""

    max_model_len_tokens: int = Field(default=0, ge=0)
    """Prompt and output together; 0 takes the model's own limit."""

    kv_cache_bytes: int = Field(default=0, ge=0)
    """Memory for KV, whatever the device has; 0 takes the engine's default."""

    host_kv_bytes: int = Field(default=0, ge=0)
    """Host memory for KV that the device has no room for, to be loaded from there in place of
    being computed again; 0 keeps none. vLLM can with GPUs only."""

    device_memory_fraction: float = Field(default=0, ge=0, le=1)
    """Share of a GPU's memory for weights and KV, when workers share one; 0 takes the engine's
    default."""

    max_running_requests: int = Field(default=0, ge=0)
    """Sequences in one batch; 0 takes the engine's default."""

    max_waiting_requests: int = Field(default=1024, ge=1)
    """Requests that may wait for the batch; more are refused, retryably."""

    nixl_port: int = Field(default=0, ge=0, le=65535)
    """Port on which a vLLM worker offers its KV to others; 0 takes a free one."""

    kv_events: bool = True
    """Whether KV events go out. Without them routers guess what the worker holds, each from what
    it sent itself."""

    transfer_timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest pull of one prompt's KV before the worker computes the prompt itself."""

    kv_lease_seconds: float = Field(default=30.0, gt=1)
    """How long a computed prompt's KV is kept for a pull."""

    sim_timing: Literal["default", "fixed", "dynamo_mocker"] = "default"
    """Timing model of the simulator; fixed takes `sim_step_ms` for every step."""

    sim_step_ms: float = Field(default=6.0, gt=0)
    """Length of a step with `sim_timing` fixed, in milliseconds."""

    sim_kv_tokens: int = Field(default=524_288, ge=1024)
    """KV capacity of the simulator, in tokens."""

    sim_host_bytes_per_second: float = Field(default=20e9, gt=0)
    """How fast the simulator loads KV from host memory; a token of it takes 128 KiB there."""

    sim_embedding_dimensions: int = Field(default=384, ge=1)
    """Length of the simulator's vectors, with `task` embed."""

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.served_model_name or self.model.resolve().name
