"""Log probabilities on their way from a worker's columns to the text that they belong to. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from libs.common.errors import ProtocolViolation
from switchgear.common.v1 import outputs_pb2

Position: TypeAlias = Sequence[tuple[int, float]]
"""Tokens with their log probabilities: the one that stands there, then the likeliest."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token in its place, and what else might have stood there."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    alternatives: Sequence[tuple[int, float]]
    """The likeliest tokens, likeliest first."""
    begin: int
    """Characters of text before the token's own."""


def positions_of(columns: outputs_pb2.Logprobs) -> Iterator[tuple[int, list[Position]]]:
    """The positions of each entry, by handle. Raises ProtocolViolation for columns that do not fit
    together."""
    tokens, logprobs = list(columns.token_ids), list(columns.logprobs)
    begin = 0
    try:
        for handle, positions, width in zip(
            columns.handles, columns.position_counts, columns.candidate_counts, strict=True
        ):
            end = begin + positions * width
            if not width or end > len(tokens):
                raise ValueError("counts do not match the candidates")
            candidates = list(zip(tokens[begin:end], logprobs[begin:end], strict=True))
            yield handle, [candidates[at : at + width] for at in range(0, len(candidates), width)]
            begin = end
    except ValueError as error:
        raise ProtocolViolation(f"malformed log probabilities: {error}") from None


def of_prompt(
    prompt: Sequence[int], positions: Sequence[Position], pieces: Sequence[str]
) -> list[TokenLogprobs]:
    """Those of a prompt, whose first token has none; `pieces` are the tokens' texts."""
    begin = 0
    found = []
    for index, (token, piece) in enumerate(zip(prompt, pieces, strict=True)):
        if index == 0:
            found.append(TokenLogprobs(token, None, (), begin))
        else:
            found.append(_at(positions[index - 1], begin))
        begin += len(piece)
    return found


def _at(position: Position, begin: int) -> TokenLogprobs:
    (token, logprob), *alternatives = position
    return TokenLogprobs(token, logprob, alternatives, begin)


class LogprobLedger:
    """Lets log probabilities out when the text of their tokens is.

    Text can be held back because it may become a stop string, and is cut off when it does.
    """

    def __init__(self) -> None:
        self._waiting: deque[TokenLogprobs] = deque()
        self._known_characters = 0
        self._read_characters = 0

    def add(self, position: Position, piece: str) -> None:
        """Takes the next token, and the text that it completes."""
        self._waiting.append(_at(position, self._known_characters))
        self._known_characters += len(piece)

    def read(self, text: str) -> None:
        """Takes note of text that was let out."""
        self._read_characters += len(text)

    def take(self, *, rest: bool = False) -> list[TokenLogprobs]:
        """Those of tokens that begin within the text let out; with `rest` those after it, too."""
        found = []
        while self._waiting and (rest or self._waiting[0].begin < self._read_characters):
            found.append(self._waiting.popleft())
        return found
