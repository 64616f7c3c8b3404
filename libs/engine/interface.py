"""What a worker asks of an engine, and what it gets back.

An engine computes prompts and generates tokens, or pools prompts into vectors. It is told requests
and cancellations, and reports through a sink: once for each engine step, with what all sequences
produced in it, and whenever its KV cache changes. Everything happens on the event loop's thread; an
engine with threads or processes of its own brings their results there first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType, Protocol

import msgspec

from libs.common.errors import SwitchgearError
from libs.common.kv_events import Tier

RequestKey = NewType("RequestKey", int)
"""Names a request within one engine process; never reused."""

EngineHash = NewType("EngineHash", bytes)
"""The engine's own name for a block, opaque to us. Only equality means something."""


class FinishReason(Enum):
    """Why a sequence ended. Values are those of switchgear.common.v1.FinishReason."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class Leg(Enum):
    """The part of a request that an engine runs. Values are those of switchgear.worker.v1.Leg."""

    PREFILL = 1
    DECODE = 2
    WHOLE = 3


class Language(Enum):
    """What kind of text an output must be. Values are names in OutputConstraint."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICES = "choices"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What the output must look like. As switchgear.common.v1.OutputConstraint."""

    language: Language
    definition: str = ""
    """The schema, expression or grammar; empty for the other languages."""
    choices: tuple[str, ...] = ()


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. None means the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = msgspec.field(default_factory=dict)
    """By token id."""
    constraint: OutputConstraint | None = None


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """How many alternatives to report beside each token; None reports nothing of it."""

    output_alternatives: int | None = None
    prompt_alternatives: int | None = None


class PoolingTask(Enum):
    """What to make of a prompt instead of output. Values are those of
    switchgear.common.v1.PoolingTask."""

    EMBED = 1


@dataclass(frozen=True, slots=True)
class PoolingOptions:
    """As switchgear.common.v1.PoolingOptions."""

    task: PoolingTask
    dimensions: int | None = None
    """Length of the vector; None is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSession:
    """Where a prefill engine keeps a computed prompt's KV. As switchgear.common.v1.KvSessionRef."""

    session_id: str
    transfer_backend: str
    endpoints: tuple[str, ...]
    attributes: bytes
    """JSON for the peer engine's connector."""
    time_to_live_seconds: float
    """How long the blocks may still be pulled, counted from when this object was made."""
    last_sequence_hash: int
    tokens: int


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, checked against the engine's limits by the worker before it gets here."""

    key: RequestKey
    request_id: str
    prompt: Sequence[int]
    """Token ids, at least one."""
    last_sequence_hash: int
    """Of the prompt's last full block; 0 when it has none."""
    leg: Leg
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    sampling: Sampling = msgspec.field(default_factory=Sampling)
    cache_salt: str = ""
    logprobs: LogprobOptions | None = None
    priority: int = 0
    """Lower ones first."""
    produced_tokens: int = 0
    """How many of the prompt's last tokens are output of an earlier worker."""
    kv_session: KvSession | None = None
    """For the decode leg. Checked by the engine just before it pulls; what can't be pulled in
    time is computed here."""
    pooling: PoolingOptions | None = None
    """None generates. With it nothing of output means anything, and the leg is WHOLE."""
    traceparent: str = ""
    """W3C trace context that the leg belongs to, for logs and spans; empty when there is none."""


@dataclass(frozen=True, slots=True)
class Start:
    """A sequence's prompt has been computed. Its first token, or what it was pooled into, follows
    in the same step."""

    key: RequestKey
    cached_tokens: int
    """Prompt tokens that this engine's own prefix cache held, in whichever tier."""
    transferred_tokens: int
    """Prompt tokens whose KV was pulled; 0 when the engine computed the prompt itself."""
    queue_seconds: float = field(default=0.0, compare=False)
    """How long the request waited before the engine began with it: computed, or pulled."""
    transfer_seconds: float = field(default=0.0, compare=False)
    """How long its KV was being pulled after that, whether or not that came to anything."""


@dataclass(frozen=True, slots=True)
class Finish:
    """A sequence ended."""

    key: RequestKey
    reason: FinishReason
    error: SwitchgearError | None = None
    """Set exactly when the reason is ERROR."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt of a prefill leg is computed and its KV can be pulled. The leg is over."""

    key: RequestKey
    kv_session: KvSession
    cached_tokens: int
    queue_seconds: float = field(default=0.0, compare=False)
    """As in Start."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities in consecutive positions of a sequence: flat, `candidates` of each.

    The first candidate of a position is the token that stands there, the others are the likeliest
    ones, likeliest first, which may be it again.
    """

    key: RequestKey
    candidates: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a prompt was pooled into. Its finish is in the same step."""

    key: RequestKey
    values: bytes
    """The vector, as 32-bit floats, little-endian."""


@dataclass(slots=True)
class Step:
    """What one engine step produced. `keys`, `counts` and `tokens` are columns: keys[i] got the
    next counts[i] of tokens. Order of meaning: starts, tokens, finishes."""

    keys: list[RequestKey] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """Of the tokens of requests that asked for them, in the same order."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Of prompts, from their second token on, in the step that starts them."""
    pooled: list[Pooled] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is now. See switchgear.common.v1.WorkerLoad."""

    running_requests: int
    waiting_requests: int
    queued_prefill_tokens: int
    active_kv_blocks: int
    total_kv_blocks: int


@dataclass(frozen=True, slots=True)
class EngineBlocksStored:
    """Full blocks that can be reused from now on, each following the one before it."""

    engine_hashes: tuple[EngineHash, ...]
    parent: EngineHash | None
    """The block before the first one; None at the start of a prompt."""
    token_ids: Sequence[int]
    """Of all the blocks, block_size of them each. May be empty for a tier below the device, when
    the engine holds these blocks in another tier just now."""
    lora_name: str = ""
    cache_salt: str = ""
    sequence_hashes: Sequence[int] | None = field(default=None, compare=False)
    """Of the blocks, by libs.common.hashing, from an engine that has them anyway. They say what the
    tokens, name and salt say, so that nobody computes them again."""
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class EngineBlocksRemoved:
    """Blocks that are gone from a tier, in any order. They may be in another still."""

    engine_hashes: tuple[EngineHash, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class EngineCacheCleared:
    """All blocks are gone, from all tiers."""


EngineKvEvent = EngineBlocksStored | EngineBlocksRemoved | EngineCacheCleared


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine turned out to be, once it has started."""

    block_size_tokens: int
    total_kv_blocks: int
    context_length_tokens: int
    max_running_requests: int
    transfer_backend: str
    """What KvSession.transfer_backend it gives and takes; empty for none."""
    publishes_kv_events: bool
    pooling_tasks: tuple[PoolingTask, ...] = ()
    """What it does with prompts; empty: it generates. No engine does both."""
    has_host_tier: bool = False
    """Whether it keeps blocks in host memory as well, and loads them from there."""


class EngineSink(Protocol):
    """Where an engine reports. Called on the event loop's thread; must not block or raise."""

    def step(self, step: Step) -> None:
        """One engine step is done. Finished keys are never heard of again."""

    def kv_events(self, events: Sequence[EngineKvEvent]) -> None:
        """The KV cache changed, in this order."""

    def load_changed(self) -> None:
        """The load may have changed without a submission, a cancellation or a step, or since."""

    def failed(self, error: BaseException) -> None:
        """The engine is dead and will report nothing more. Called once at most; the sink logs the
        error."""


@dataclass(frozen=True, slots=True)
class TransferCounters:
    """What an engine moved since it started. Counters never fall."""

    transferred_bytes: int
    transferred_blocks: int
    """Blocks of the prompts that were pulled, a partial last one counted whole."""
    transfer_failures: int
    """Pulls that were refused, broke or took too long; their prompts were computed here."""
    loaded_host_blocks: int = 0
    """Blocks brought back from its own host tier."""


class Engine(ABC):
    """One model on one device group."""

    @abstractmethod
    async def start(self, sink: EngineSink) -> EngineInfo:
        """Loads the model; returns when requests can be taken. Called once."""

    @abstractmethod
    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Takes requests in, in order. Every one of them ends in exactly one Finish or Prefilled,
        unless the engine dies or the request is cancelled first. One that asks for what the engine
        can't do ends with InvalidRequest."""

    @abstractmethod
    def cancel(self, keys: Sequence[RequestKey]) -> None:
        """Drops requests at whatever point they are, and the KV kept for a computed prompt with
        them. Unknown keys are ignored. A cancelled request is never heard of again."""

    @abstractmethod
    def load(self) -> EngineLoad:
        """How busy the engine is, as of its last step plus what was submitted since."""

    @abstractmethod
    def counters(self) -> TransferCounters:
        """What was pulled and loaded so far."""

    @abstractmethod
    async def close(self) -> None:
        """Stops the engine and frees its device within some seconds. Safe to call twice."""
