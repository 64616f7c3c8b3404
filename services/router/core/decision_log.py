"""The last decisions, kept as they were made; whoever asks for them pays for the words. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.router.core.decision import Candidate, Decision, Policy
from services.router.core.hold import Hold
from services.router.core.workers import InstanceId

MAX_CANDIDATES = 100_000
"""Of all decisions kept: with a thousand workers, each has as many."""


@dataclass(slots=True, kw_only=True)
class Record:
    """A decision, and what its engines said of it later."""

    request_id: str
    model: str
    decided_at: float
    """In seconds since 1970."""
    prompt_tokens: int
    block_size_tokens: int
    decision: Decision
    policy: Policy
    """In force for it, with what the request asked for itself."""
    are_overlaps_known: bool
    """False when no KV indexer answered."""
    session_worker: InstanceId | None = None
    """Who served the request's session last."""
    lora_name: str = ""
    """The adapter that the prompt is hashed for."""
    prefill_cached_tokens: int | None = None
    """Prompt tokens that the prefill worker's engine found cached; None until it said so."""
    decode_cached_tokens: int | None = None
    """Likewise of the decode worker's."""
    transferred_tokens: int | None = None
    """Prompt tokens that the decode worker pulled; None until it said so."""
    holds: tuple[Hold, ...] = ()
    """When the request was held back before the decision was carried out, or its decode leg."""

    def predicted_cached_tokens(self, candidate: Candidate) -> int:
        """Prompt tokens that a candidate was thought to hold. The last one is always computed."""
        return min(candidate.held_tokens, self.prompt_tokens - 1)

    def decide_again(self, later: Record) -> None:
        """The request has been held since this decision, and that one is carried out."""
        self.session_worker = later.session_worker
        self.decision = later.decision

    def hand_over(self, later: Record) -> None:
        """A prefill worker has computed the prompt, and this was decided on its decode leg then."""
        self.session_worker = later.session_worker
        self.decision = self.decision._replace(
            decode=later.decision.decode,
            decode_candidates=later.decision.decode_candidates,
            decode_pick=later.decision.decode_pick,
        )

    @property
    def candidates(self) -> int:
        """How many it keeps, those of all legs together."""
        decision = self.decision
        whole = decision.whole_candidates
        is_shared = whole is decision.decode_candidates
        return (
            len(decision.decode_candidates)
            + len(decision.prefill_candidates)
            + (0 if is_shared else len(whole))
        )


class DecisionLog:
    """A ring of records, bounded in records and in candidates."""

    def __init__(self, max_records: int, max_candidates: int = MAX_CANDIDATES) -> None:
        """With `max_records` 0 nothing is kept."""
        self._max_records = max_records
        self._max_candidates = max_candidates
        self._records: deque[tuple[Record, int]] = deque()
        """With how many candidates each had when it came."""
        self._candidates = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Keeps the record, in place of the oldest ones. It may still be filled in."""
        candidates = record.candidates
        self._records.append((record, candidates))
        self._candidates += candidates
        while len(self._records) > self._max_records or self._candidates > self._max_candidates:
            _, dropped = self._records.popleft()
            self._candidates -= dropped

    def find(self, request_id: str = "", limit: int = 0) -> list[Record]:
        """Newest first; of one request, or of all; `limit` 0 means no limit."""
        found: list[Record] = []
        for record, _ in reversed(self._records):
            if request_id in ("", record.request_id):
                found.append(record)
                if len(found) == limit:
                    break
        return found
