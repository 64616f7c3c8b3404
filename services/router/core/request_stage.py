"""Where a request is on its way through the router, and where it goes when a leg fails. Pure.

    ASKING ─┬────────────────┬──────────┬─> SENT ──> DECODING ──> ENDED
            ├─> PREFILLING ──┤          │
            └────────────────┴─> HELD ──┘

A request is held before its prompt is computed or after it, and goes on from there as it would
have gone, to PREFILLING, too. It may end in any stage. It is sent again when a worker has refused
it, and another one gets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum, StrEnum


class Stage(StrEnum):
    """What is being waited for."""

    ASKING = "asking"
    """KV indexers, to say who holds its prompt."""
    HELD = "held"
    """Room at a decode worker."""
    PREFILLING = "prefilling"
    """A prefill worker, to compute its prompt."""
    SENT = "sent"
    """A decode worker, to compute its prompt or to pull its KV."""
    DECODING = "decoding"
    """The tokens of a decode worker that has the prompt's KV."""
    ENDED = "ended"
    """Nothing."""


FOLLOWING: Mapping[Stage, Set[Stage]] = {
    Stage.ASKING: {Stage.HELD, Stage.PREFILLING, Stage.SENT, Stage.ENDED},
    Stage.HELD: {Stage.PREFILLING, Stage.SENT, Stage.ENDED},
    Stage.PREFILLING: {Stage.HELD, Stage.SENT, Stage.ENDED},
    # Back to itself, and from DECODING to SENT: a worker may refuse late, and say twice that it has
    # begun.
    Stage.SENT: {Stage.SENT, Stage.DECODING, Stage.ENDED},
    Stage.DECODING: {Stage.SENT, Stage.DECODING, Stage.ENDED},
    Stage.ENDED: set(),
}
"""The stages that can come after each."""


class Remedy(Enum):
    """What is done about a leg that failed."""

    PREFILL_THERE = "prefill_there"
    """A decode worker computes the prompt itself."""
    ELSEWHERE = "elsewhere"
    """Another decode worker gets the request."""
    HAND_BACK = "hand_back"
    """The request fails. Whoever has its tokens may migrate it."""


def remedy(stage: Stage, *, can_be_repeated: bool) -> Remedy:
    """For a leg that failed in a stage. `can_be_repeated`: its worker has produced nothing of it,
    and another one may do better."""
    if stage is Stage.PREFILLING:
        return Remedy.PREFILL_THERE
    return Remedy.ELSEWHERE if can_be_repeated else Remedy.HAND_BACK


def prefill_seconds(longest_seconds: float, left_seconds: float | None) -> float:
    """How long a prefill worker may take. `left_seconds`: until the deadline, if there is one; half
    of it stays for computing the prompt after all."""
    if left_seconds is None:
        return longest_seconds
    return min(longest_seconds, max(0.0, left_seconds) / 2)
