"""Continuous batching over a pool of KV blocks.

A step is two calls: `begin_step` chooses the work and says how long it takes, `end_step` does it.
In between the driver lets that time pass, on whatever clock it has, and may submit and cancel.

    begin_step   1. every decoding sequence gets room for one token
                 2. prompts under way go on, oldest first, with what is left of the chunk
                 3. waiting requests are admitted in order of priority, then of arrival
    end_step     4. tokens are drawn, full blocks are published, sequences end

A prompt that is to be embedded ends where another would get its first token. One of which the host
tier holds what the device does not is admitted, waits for that to be loaded, beside the steps, and
then goes on as a prompt under way.

When no block is left in 1 or 2, the youngest running sequence of the last priority gives up its
own and starts again later; what it has published is likely to be still cached then. The oldest one
of the first priority thus always advances.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain

from libs.common import hashing
from libs.common.errors import (
    ContextTooLong,
    InvalidRequest,
    SwitchgearError,
    TransferFailed,
)
from libs.engine.interface import (
    EngineHash,
    EngineKvEvent,
    EngineLoad,
    EngineRequest,
    Finish,
    FinishReason,
    KvSession,
    Leg,
    Logprobs,
    Pooled,
    Prefilled,
    RequestKey,
    Start,
    Step,
)
from libs.engine.sim.core import tokens as token_states
from libs.engine.sim.core.embedding import embedding
from libs.engine.sim.core.host_tier import HostLink, HostTier, TieredPool
from libs.engine.sim.core.pool import BlockPool
from libs.engine.sim.core.sequence import Phase, Sequence
from libs.engine.sim.core.timing import StepWork, TimingModel
from libs.engine.sim.core.tokens import TokenSource

TRANSFER_BACKEND = "sim"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much an engine can do at once."""

    block_size_tokens: int
    total_kv_blocks: int
    context_length_tokens: int
    """Prompt and output together."""
    max_running_requests: int
    chunk_tokens: int
    """Computed in one step at most, prompts and decoding together. At least
    max_running_requests, so that every decoding sequence gets its token."""
    kv_lease_seconds: float
    """How long a prefill leg's KV is kept for whoever pulls it."""
    embedding_dimensions: int = 0
    """Length of the vectors that prompts become; 0 for an engine that generates."""
    host_kv_blocks: int = 0
    """Room in host memory for blocks that the device evicts; 0 for no host tier."""
    host_load_seconds_per_block: float = 0.0
    """What bringing back one of them takes."""


@dataclass(frozen=True, slots=True)
class Pull:
    """KV that the driver is to fetch; then it calls `pulled` or `pull_failed`."""

    key: RequestKey
    kv_session: KvSession
    missing_blocks: int
    """Of the prompt, its partial last block included; the others are cached here."""
    request_id: str = ""
    """For logs, as is the traceparent."""
    traceparent: str = ""


class Scheduler:
    """One simulated engine. Times are seconds on any clock that does not go back."""

    def __init__(
        self,
        limits: SchedulerLimits,
        step_seconds: TimingModel,
        token_source: TokenSource,
        *,
        engine_id: str,
        endpoints: tuple[str, ...] = (),
    ) -> None:
        self.limits = limits
        self.host = HostTier(limits.host_kv_blocks) if limits.host_kv_blocks else None
        self.pool = (
            BlockPool(limits.total_kv_blocks, limits.block_size_tokens)
            if self.host is None
            else TieredPool(limits.total_kv_blocks, limits.block_size_tokens, self.host)
        )
        """For others to look at only, as is the host tier."""
        self.loaded_host_blocks = 0
        """Brought back from the host tier."""
        self.endpoints = endpoints
        """Where other engines pull from, as host:port."""
        self.transfer_failures = 0
        """Prompts computed here because their KV could not be pulled."""
        self.preemptions = 0
        """How often a running sequence had to give up its blocks."""
        self._step_seconds = step_seconds
        self._token_source = token_source
        self._engine_id = engine_id
        self._sequences: dict[RequestKey, Sequence] = {}
        self._waiting: OrderedDict[RequestKey, Sequence] = OrderedDict()
        self._pulling: dict[RequestKey, Sequence] = {}
        self._loading: dict[RequestKey, Sequence] = {}
        """In the order in which they will be there."""
        self._host_link = HostLink(limits.host_load_seconds_per_block)
        self._prefilling: dict[RequestKey, Sequence] = {}
        self._decoding: dict[RequestKey, Sequence] = {}
        self._decoding_tokens = 0
        """Of all decoding sequences, prompts and outputs."""
        self._kept: dict[str, Sequence] = {}
        """By session id."""
        self._next_expiry = float("inf")
        """No kept sequence expires before."""
        self._chunks: list[tuple[Sequence, int]] = []
        """Prompt tokens that the current step computes."""
        self._pulls: list[Pull] = []
        self._refused: dict[RequestKey, SwitchgearError] = {}
        self._arrivals = 0
        self._has_priorities = False
        """Whether any request has ever had one; else requests wait in order."""
        self._queued_prefill_tokens = 0

    # Requests

    def submit(self, request: EngineRequest, now: float) -> None:
        """Takes a request in.

        One whose prompt leaves no room for a token, in the context or in the whole KV cache, ends
        with ContextTooLong. Output that would not fit is cut short with LENGTH.
        """
        limits = self.limits
        # The last token of a sequence is never computed on, so it needs no slot.
        room_tokens = min(
            limits.context_length_tokens, limits.total_kv_blocks * limits.block_size_tokens + 1
        )
        if request.pooling is not None:
            if (problem := self._pooling_problem(request)) is not None:
                self._refused[request.key] = problem
                return
        elif len(request.prompt) >= room_tokens:
            self._refused[request.key] = ContextTooLong(
                f"a prompt of {len(request.prompt)} tokens leaves no room for output in "
                f"{room_tokens} tokens",
                param="prompt",
            )
            return
        if request.sampling.constraint is not None:
            self._refused[request.key] = InvalidRequest(
                "the simulated engine has no structured output", param="constraint"
            )
            return
        self._has_priorities = self._has_priorities or request.priority != 0
        stops = frozenset(request.stop_token_ids)
        eos = self._token_source.eos_token_id
        if eos is not None and not request.ignore_eos:
            stops |= {eos}
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            submitted_at=now,
            length_limit_tokens=min(len(request.prompt) + request.max_tokens, room_tokens),
            stop_token_ids=stops,
            seed=token_states.seed_state(request.sampling.seed),
        )
        self._arrivals += 1
        self._sequences[request.key] = sequence
        self._waiting[request.key] = sequence
        self._set_pending_prefill(sequence, len(sequence.tokens))

    def _pooling_problem(self, request: EngineRequest) -> SwitchgearError | None:
        limits = self.limits
        assert request.pooling is not None
        if request.pooling.dimensions is not None:
            return InvalidRequest(
                "the simulated engine's vectors can't be cut short: dimensions must not be given, "
                f"got {request.pooling.dimensions}",
                param="dimensions",
            )
        room_tokens = min(
            limits.context_length_tokens, limits.total_kv_blocks * limits.block_size_tokens
        )
        if len(request.prompt) > room_tokens:
            return ContextTooLong(
                f"a prompt of {len(request.prompt)} tokens does not fit into {room_tokens}",
                param="prompt",
            )
        return None

    def cancel(self, key: RequestKey) -> None:
        """Drops a request wherever it is. Unknown keys are ignored."""
        self._refused.pop(key, None)
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._end(sequence)

    # Steps

    def begin_step(self, now: float) -> float | None:
        """Chooses the next step's work. Returns the seconds it takes; None if there is nothing to
        do until something is submitted, pulled, cancelled or released, or `next_expiry`."""
        self.expire(now)
        if self._loading:
            self._end_loads(now)
        self._chunks.clear()
        preemptions = self.preemptions
        self._make_room_to_decode()
        budget_tokens = self._continue_prefills(self.limits.chunk_tokens - len(self._decoding))
        # Whoever was preempted may still be in the chunks, and is not to be there twice.
        if self.preemptions == preemptions:
            self._admit(budget_tokens, now)
        work = self._work()
        if work.prefill_tokens or work.decoding_sequences:
            return self._step_seconds(work)
        return 0.0 if self._refused else None

    def end_step(self, now: float) -> Step:
        """Does the work that was begun, less what was cancelled since."""
        step = Step()
        for key, error in self._refused.items():
            step.finishes.append(Finish(key, FinishReason.ERROR, error))
        self._refused.clear()
        for sequence in list(self._decoding.values()):
            self._advance(sequence)
            self._draw(sequence, step)
        for sequence, count_tokens in self._chunks:
            if sequence.phase is Phase.PREFILLING:
                sequence.computed_tokens += count_tokens
                self._publish_full_blocks(sequence)
                left = len(sequence.tokens) - sequence.computed_tokens
                self._set_pending_prefill(sequence, left)
                if not left:
                    self._complete_prompt(sequence, step, now)
        step.counts = [1] * len(step.keys)
        return step

    def take_events(self) -> list[EngineKvEvent]:
        """What happened to the cache since the last call, in order."""
        return self.pool.take_events()

    def load(self) -> EngineLoad:
        return EngineLoad(
            running_requests=len(self._decoding) + len(self._prefilling),
            waiting_requests=len(self._waiting) + len(self._pulling) + len(self._loading),
            queued_prefill_tokens=self._queued_prefill_tokens,
            active_kv_blocks=self.pool.active_blocks,
            total_kv_blocks=self.pool.total_blocks,
        )

    # Pulling from another engine

    def take_pulls(self) -> list[Pull]:
        """Transfers to begin."""
        pulls, self._pulls = self._pulls, []
        return pulls

    def pulled(self, key: RequestKey, transfer_seconds: float = 0.0) -> None:
        """A prompt's KV has arrived, after so long; ignored if the request has been cancelled. Its
        last token is still to be computed, since a token is drawn from what that one gives."""
        sequence = self._pulling.pop(key, None)
        if sequence is None:
            return
        sequence.transfer_seconds = transfer_seconds
        sequence.computed_tokens = len(sequence.tokens) - 1
        sequence.transferred_tokens = sequence.computed_tokens - sequence.cached_tokens
        self._publish_full_blocks(sequence)
        sequence.phase = Phase.PREFILLING
        self._prefilling[key] = sequence
        self._set_pending_prefill(sequence, 1)

    def pull_failed(self, key: RequestKey, transfer_seconds: float = 0.0) -> None:
        """The prompt is computed here, after all; ignored if the request has been cancelled."""
        sequence = self._pulling.pop(key, None)
        if sequence is None:
            return
        sequence.transfer_seconds = transfer_seconds
        self._drop_session(sequence)
        self._restart(sequence)

    # Being pulled from

    def offer(
        self, session_id: str, last_sequence_hash: int, now: float, hold_seconds: float
    ) -> int:
        """Blocks of a kept prompt that can be pulled. They stay at least so long.

        Raises TransferFailed: no such session, any more or ever, or another prompt's.
        """
        sequence = self._kept_at(session_id, now)
        if sequence.request.last_sequence_hash != last_sequence_hash:
            raise TransferFailed(f"KV session {session_id} is of another prompt")
        sequence.expires_at = max(sequence.expires_at, now + hold_seconds)
        return sequence.held_blocks + sequence.private_blocks

    def release(self, session_id: str, now: float) -> None:
        """A pull is complete; the blocks were this prompt's until now.

        Raises TransferFailed: they were not.
        """
        self._end(self._kept_at(session_id, now))

    def expire(self, now: float) -> None:
        """Frees kept prompts whose lease is over."""
        if now < self._next_expiry:
            return
        for sequence in list(self._kept.values()):
            if sequence.expires_at <= now:
                self._end(sequence)
        self._next_expiry = min(
            (sequence.expires_at for sequence in self._kept.values()), default=float("inf")
        )

    @property
    def next_expiry(self) -> float | None:
        """When a lease is over or a load has come; None while nothing is kept and none is under
        way."""
        expiry = self._next_expiry if self._kept else None
        if self._loading:
            loaded_at = next(iter(self._loading.values())).loaded_at
            return loaded_at if expiry is None else min(loaded_at, expiry)
        return expiry

    def check_invariants(self) -> None:
        """For tests, between steps."""
        self.pool.check_invariants()
        everyone = self._sequences.values()
        holders = Counter(block for each in everyone for block in each.hashes[: each.held_blocks])
        assert {block: n for block, n in self.pool.holders().items() if n} == holders
        assert sum(each.private_blocks for each in everyone) == self.pool.private_blocks
        assert sum(each.pending_prefill_tokens for each in everyone) == self._queued_prefill_tokens
        decoding = self._decoding.values()
        assert sum(len(each.tokens) for each in decoding) == self._decoding_tokens
        groups = {
            Phase.WAITING: self._waiting,
            Phase.PULLING: self._pulling,
            Phase.LOADING: self._loading,
            Phase.PREFILLING: self._prefilling,
            Phase.DECODING: self._decoding,
            Phase.KEPT: {each.request.key: each for each in self._kept.values()},
        }
        assert sum(map(len, groups.values())) == len(self._sequences)
        for phase, group in groups.items():
            for key, each in group.items():
                assert each.phase is phase
                assert self._sequences[key] is each
                if phase is Phase.WAITING:
                    assert not each.held_blocks
                    assert not each.private_blocks
                if phase is Phase.DECODING:
                    assert each.private_blocks == (each.room_tokens > 0)
        assert self._running_or_coming() <= self.limits.max_running_requests
        if self.host is not None:
            self.host.check_invariants()
            reading = Counter(block for each in everyone for block in each.loading)
            assert {block: n for block, n in self.host.readers().items() if n} == reading

    # Choosing the work of a step

    def _make_room_to_decode(self) -> None:
        for sequence in [each for each in self._decoding.values() if not each.room_tokens]:
            # It may have been preempted for one before it.
            if sequence.phase is Phase.DECODING and self._grow(sequence, 1):
                sequence.room_tokens = self.limits.block_size_tokens

    def _continue_prefills(self, budget_tokens: int) -> int:
        """What is left of the budget."""
        for sequence in list(self._prefilling.values()):
            if not budget_tokens:
                break
            count = min(budget_tokens, len(sequence.tokens) - sequence.computed_tokens)
            if sequence.phase is Phase.PREFILLING and self._grow(
                sequence, self._blocks_short(sequence, count)
            ):
                self._chunks.append((sequence, count))
                budget_tokens -= count
        return budget_tokens

    def _admit(self, budget_tokens: int, now: float) -> None:
        while self._waiting and self._running_or_coming() < self.limits.max_running_requests:
            sequence = self._next_waiting()
            if sequence.kv_session and not self._is_pullable(sequence, sequence.kv_session, now):
                self._drop_session(sequence)
            if not (sequence.kv_session or budget_tokens):
                return
            self._hash_full_blocks(sequence, len(sequence.tokens))
            # Of a prompt that is cached whole, the last token must still be computed.
            block_size = self.limits.block_size_tokens
            most_blocks = (len(sequence.tokens) - 1) // block_size
            cached_blocks = self.pool.cached_prefix(sequence.hashes, most_blocks)
            if self.host is not None and not sequence.kv_session:
                coming = self.host.prefix(sequence.hashes, cached_blocks, most_blocks)
                if coming:
                    if not self._load(self.host, sequence, cached_blocks, coming, now):
                        return
                    continue
            missing_tokens = len(sequence.tokens) - cached_blocks * block_size
            count = missing_tokens if sequence.kv_session else min(budget_tokens, missing_tokens)
            private_blocks = -(-count // block_size)
            if not self.pool.acquire(sequence.hashes[:cached_blocks], private_blocks):
                return
            del self._waiting[sequence.request.key]
            sequence.held_blocks = cached_blocks
            sequence.private_blocks = private_blocks
            sequence.computed_tokens = cached_blocks * block_size
            if not sequence.was_admitted:
                # Later on it finds what it has computed itself.
                sequence.was_admitted = True
                sequence.admitted_at = now
                sequence.cached_tokens = sequence.computed_tokens
            if sequence.kv_session:
                sequence.phase = Phase.PULLING
                self._pulling[sequence.request.key] = sequence
                self._set_pending_prefill(sequence, 1)
                self._pulls.append(
                    Pull(
                        sequence.request.key,
                        sequence.kv_session,
                        private_blocks,
                        sequence.request.request_id,
                        sequence.request.traceparent,
                    )
                )
            else:
                sequence.phase = Phase.PREFILLING
                self._prefilling[sequence.request.key] = sequence
                self._set_pending_prefill(sequence, missing_tokens)
                self._chunks.append((sequence, count))
                budget_tokens -= count

    def _load(
        self,
        host: HostTier,
        sequence: Sequence,
        cached_blocks: int,
        blocks: list[EngineHash],
        now: float,
    ) -> bool:
        """Admits a sequence and has its next blocks loaded; False, and nothing has changed, when
        the device has no room for them."""
        # Making room there fills the host tier, which is not to drop these for it.
        host.begin_read(blocks)
        if not self.pool.acquire(sequence.hashes[:cached_blocks], len(blocks)):
            host.end_read(blocks)
            return False
        block_size = self.limits.block_size_tokens
        key = sequence.request.key
        del self._waiting[key]
        sequence.held_blocks = cached_blocks
        sequence.private_blocks = len(blocks)
        sequence.computed_tokens = cached_blocks * block_size
        held_tokens = sequence.computed_tokens + len(blocks) * block_size
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.admitted_at = now
            sequence.cached_tokens = held_tokens
        sequence.phase = Phase.LOADING
        sequence.loading = blocks
        sequence.loaded_at = self._host_link.load(len(blocks), now)
        self._loading[key] = sequence
        self._set_pending_prefill(sequence, len(sequence.tokens) - held_tokens)
        return True

    def _end_loads(self, now: float) -> None:
        """Goes on with the prompts whose blocks have come from the host tier."""
        for key, sequence in list(self._loading.items()):
            if sequence.loaded_at > now:
                return
            self.loaded_host_blocks += len(sequence.loading)
            sequence.computed_tokens += len(sequence.loading) * self.limits.block_size_tokens
            self._end_load(sequence)
            self._publish_full_blocks(sequence)
            sequence.phase = Phase.PREFILLING
            self._prefilling[key] = sequence

    def _end_load(self, sequence: Sequence) -> None:
        assert self.host is not None
        del self._loading[sequence.request.key]
        self.host.end_read(sequence.loading)
        sequence.loading = []

    def _next_waiting(self) -> Sequence:
        if self._has_priorities:
            # The first one among equals.
            return min(self._waiting.values(), key=lambda each: each.request.priority)
        return next(iter(self._waiting.values()))

    def _work(self) -> StepWork:
        prefill_tokens = 0
        decoding_sequences = len(self._decoding)
        decoding_tokens = self._decoding_tokens
        for sequence, count_tokens in self._chunks:
            if sequence.phase is not Phase.PREFILLING:
                continue
            if sequence.transferred_tokens and count_tokens == 1:
                decoding_sequences += 1
                decoding_tokens += len(sequence.tokens)
            else:
                prefill_tokens += count_tokens
        room_tokens = self.pool.total_blocks * self.limits.block_size_tokens
        return StepWork(prefill_tokens, decoding_sequences, min(1.0, decoding_tokens / room_tokens))

    def _running_or_coming(self) -> int:
        running = len(self._decoding) + len(self._prefilling)
        return running + len(self._pulling) + len(self._loading)

    def _is_pullable(self, sequence: Sequence, session: KvSession, now: float) -> bool:
        return (
            session.transfer_backend == TRANSFER_BACKEND
            and bool(session.endpoints)
            and session.tokens == len(sequence.tokens)
            and session.last_sequence_hash == sequence.request.last_sequence_hash
            and now < sequence.submitted_at + session.time_to_live_seconds
        )

    def _blocks_short(self, sequence: Sequence, count_tokens: int) -> int:
        """Blocks needed beyond those it has to compute so many more tokens."""
        needed = -(-(sequence.computed_tokens + count_tokens) // self.limits.block_size_tokens)
        return max(0, needed - sequence.held_blocks - sequence.private_blocks)

    def _grow(self, sequence: Sequence, blocks: int) -> bool:
        """Takes blocks, from the youngest running sequence if need be; False if that is the asker,
        which then waits again."""
        while not self.pool.acquire((), blocks):
            youngest = max(self._running(), key=lambda each: (each.request.priority, each.arrival))
            self.preemptions += 1
            self._restart(youngest)
            if youngest is sequence:
                return False
        sequence.private_blocks += blocks
        return True

    def _running(self) -> Iterator[Sequence]:
        return chain(self._decoding.values(), self._prefilling.values())

    # Doing it

    def _advance(self, sequence: Sequence) -> None:
        """Computes the last token of a decoding sequence."""
        sequence.room_tokens -= 1
        if sequence.room_tokens:
            sequence.state = token_states.fold(sequence.state, sequence.tokens[-1])
        else:
            sequence.computed_tokens = len(sequence.tokens)
            self._publish_full_blocks(sequence)
            sequence.state = sequence.hashes[-1]

    def _draw(self, sequence: Sequence, step: Step) -> None:
        """Gives a sequence its next token, which may be its last."""
        state = sequence.state ^ sequence.seed
        request = sequence.request
        if request.sampling.logit_bias:
            token = self._token_source.draw_biased(state, request.sampling.logit_bias)
        else:
            token = self._token_source.draw(state)
        is_last = False
        if token in sequence.stop_token_ids:
            if len(sequence.tokens) - len(request.prompt) < request.min_tokens:
                token = self._token_source.draw_other(state, sequence.stop_token_ids)
            else:
                is_last = True
                step.finishes.append(Finish(request.key, FinishReason.STOP))
        sequence.tokens.append(token)
        self._decoding_tokens += 1
        step.keys.append(request.key)
        step.tokens.append(token)
        if request.logprobs is not None and request.logprobs.output_alternatives is not None:
            asked = request.logprobs.output_alternatives
            step.logprobs.append(self._logprobs(sequence, [(state, token)], asked))
        if not is_last and len(sequence.tokens) >= sequence.length_limit_tokens:
            is_last = True
            step.finishes.append(Finish(request.key, FinishReason.LENGTH))
        if is_last:
            self._end(sequence)

    def _complete_prompt(self, sequence: Sequence, step: Step, now: float) -> None:
        request = sequence.request
        if request.pooling is not None:
            step.starts.append(_start(sequence))
            values = embedding(request.prompt, self.limits.embedding_dimensions)
            step.pooled.append(Pooled(request.key, values))
            step.finishes.append(Finish(request.key, FinishReason.STOP))
            self._end(sequence)
            return
        del self._prefilling[request.key]
        if request.leg is Leg.PREFILL:
            step.prefilled.append(self._keep(sequence, now))
            return
        if not sequence.is_started:
            sequence.is_started = True
            step.starts.append(_start(sequence))
            if request.logprobs is not None and request.logprobs.prompt_alternatives is not None:
                asked = request.logprobs.prompt_alternatives
                step.prompt_logprobs.append(self._prompt_logprobs(sequence, asked))
        sequence.phase = Phase.DECODING
        self._decoding[request.key] = sequence
        self._decoding_tokens += len(sequence.tokens)
        full_tokens = sequence.held_blocks * self.limits.block_size_tokens
        sequence.room_tokens = -len(sequence.tokens) % self.limits.block_size_tokens
        sequence.state = reduce(
            token_states.fold,
            sequence.tokens[full_tokens:],
            sequence.hashes[-1] if sequence.hashes else 0,
        )
        self._draw(sequence, step)

    def _prompt_logprobs(self, sequence: Sequence, alternatives: int) -> Logprobs:
        prompt = sequence.request.prompt
        states = token_states.states(prompt, sequence.hashes, self.limits.block_size_tokens)
        drawn = [
            (state ^ sequence.seed, token) for state, token in zip(states, prompt, strict=True)
        ]
        return self._logprobs(sequence, drawn[1:], alternatives)

    def _logprobs(
        self, sequence: Sequence, drawn: list[tuple[int, int]], alternatives: int
    ) -> Logprobs:
        """Of tokens, each with the state that it was drawn from."""
        positions = [
            self._token_source.logprobs(state, token, alternatives) for state, token in drawn
        ]
        flat = [candidate for position in positions for candidate in position]
        return Logprobs(
            sequence.request.key,
            len(positions[0]) if positions else 1,
            [token for token, _ in flat],
            [logprob for _, logprob in flat],
        )

    def _keep(self, sequence: Sequence, now: float) -> Prefilled:
        session = KvSession(
            session_id=self._session_id(sequence),
            transfer_backend=TRANSFER_BACKEND,
            endpoints=self.endpoints,
            attributes=b"{}",
            time_to_live_seconds=self.limits.kv_lease_seconds,
            last_sequence_hash=sequence.request.last_sequence_hash,
            tokens=len(sequence.tokens),
        )
        sequence.phase = Phase.KEPT
        sequence.expires_at = now + self.limits.kv_lease_seconds
        self._kept[session.session_id] = sequence
        self._next_expiry = min(self._next_expiry, sequence.expires_at)
        return Prefilled(
            sequence.request.key,
            session,
            sequence.cached_tokens,
            sequence.admitted_at - sequence.submitted_at,
        )

    def _kept_at(self, session_id: str, now: float) -> Sequence:
        sequence = self._kept.get(session_id)
        if sequence is None:
            raise TransferFailed(f"KV session {session_id} is unknown or was freed")
        if sequence.expires_at <= now:
            raise TransferFailed(f"KV session {session_id} has expired")
        return sequence

    def _session_id(self, sequence: Sequence) -> str:
        return f"{self._engine_id}-{sequence.request.key}"

    # Blocks of a sequence

    def _hash_full_blocks(self, sequence: Sequence, tokens: int) -> None:
        """Names the blocks that are full with so many tokens."""
        block_size = self.limits.block_size_tokens
        known = len(sequence.hashes)
        full = tokens // block_size
        if known < full:
            seed = hashing.seed_of(cache_salt=sequence.request.cache_salt)
            local = hashing.local_hashes(
                sequence.tokens[known * block_size : full * block_size], block_size, seed
            )
            parent = sequence.hashes[-1] if known else None
            sequence.hashes.extend(hashing.chain(local, parent))

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        """Lets others use the blocks that computing has filled."""
        full = sequence.computed_tokens // self.limits.block_size_tokens
        if full == sequence.held_blocks:
            return
        self._hash_full_blocks(sequence, sequence.computed_tokens)
        self.pool.publish(
            sequence.hashes,
            sequence.held_blocks,
            full,
            sequence.tokens,
            sequence.request.cache_salt,
        )
        sequence.private_blocks -= full - sequence.held_blocks
        sequence.held_blocks = full

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.hashes[: sequence.held_blocks], sequence.private_blocks)
        sequence.held_blocks = sequence.private_blocks = sequence.computed_tokens = 0

    # Changes of phase

    def _restart(self, sequence: Sequence) -> None:
        """Sends a sequence back to the head of the queue, with what it has produced."""
        key = sequence.request.key
        self._give_back(sequence)
        if self._decoding.pop(key, None) is not None:
            self._decoding_tokens -= len(sequence.tokens)
        self._prefilling.pop(key, None)
        sequence.phase = Phase.WAITING
        # A transfer happens once: what it brought is cached here or gone.
        sequence.kv_session = None
        if not sequence.is_started:
            sequence.transferred_tokens = 0
        self._waiting[key] = sequence
        self._waiting.move_to_end(key, last=False)
        self._set_pending_prefill(sequence, len(sequence.tokens))

    def _end(self, sequence: Sequence) -> None:
        key = sequence.request.key
        self._give_back(sequence)
        match sequence.phase:
            case Phase.WAITING:
                del self._waiting[key]
            case Phase.PULLING:
                del self._pulling[key]
            case Phase.LOADING:
                self._end_load(sequence)
            case Phase.PREFILLING:
                del self._prefilling[key]
            case Phase.DECODING:
                del self._decoding[key]
                self._decoding_tokens -= len(sequence.tokens)
            case Phase.KEPT:
                del self._kept[self._session_id(sequence)]
        sequence.phase = Phase.ENDED
        del self._sequences[key]
        self._set_pending_prefill(sequence, 0)

    def _drop_session(self, sequence: Sequence) -> None:
        sequence.kv_session = None
        self.transfer_failures += 1

    def _set_pending_prefill(self, sequence: Sequence, tokens: int) -> None:
        self._queued_prefill_tokens += tokens - sequence.pending_prefill_tokens
        sequence.pending_prefill_tokens = tokens


def _start(sequence: Sequence) -> Start:
    return Start(
        sequence.request.key,
        sequence.cached_tokens,
        sequence.transferred_tokens,
        sequence.admitted_at - sequence.submitted_at,
        sequence.transfer_seconds,
    )
