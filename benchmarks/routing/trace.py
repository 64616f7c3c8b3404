"""Recorded arrivals: when, how long, and which blocks prompts have in common."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count, islice
from pathlib import Path
from random import Random

TRACE_BLOCK_TOKENS = 512
"""What a hash id of Mooncake's traces stands for."""

MOONCAKE_TICK_SECONDS = 3.0
"""Its times are multiples of this, so that some ten requests come at each."""

_SHARED_ID = 1 << 30
"""Above any id of a trace; token ids are 32 bits wide."""


class TraceError(Exception):
    """A trace that can't be read. The message says where and why."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_seconds: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    """Equal ids stand for equal tokens. The last block may be partly used."""

    def prompt(self) -> list[int]:
        """Token ids: every token of a block is the block's id."""
        tokens: list[int] = []
        for block in self.block_ids:
            tokens.extend([block] * TRACE_BLOCK_TOKENS)
        del tokens[self.prompt_tokens :]
        return tokens


def read(path: Path, *, speed_up: float = 1.0, requests: int | None = None) -> list[Arrival]:
    """A trace in Mooncake's format: one JSON object a line with timestamp (ms), input_length,
    output_length and hash_ids. The first `requests` of it, time shortened by `speed_up`.

    Raises TraceError.
    """
    arrivals: list[Arrival] = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if requests is not None and len(arrivals) == requests:
                break
            try:
                record = json.loads(line)
                arrival = Arrival(
                    at_seconds=record["timestamp"] / 1_000 / speed_up,
                    prompt_tokens=record["input_length"],
                    output_tokens=record["output_length"],
                    block_ids=tuple(record["hash_ids"]),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}:{number}: {error!r}") from error
            if not 0 < arrival.prompt_tokens <= len(arrival.block_ids) * TRACE_BLOCK_TOKENS:
                raise TraceError(f"{path}:{number}: input_length does not fit hash_ids")
            arrivals.append(arrival)
    if not arrivals:
        raise TraceError(f"{path}: no requests")
    return sorted(arrivals, key=lambda arrival: arrival.at_seconds)


def read_azure(path: Path, *, requests: int | None = None) -> list[Arrival]:
    """A trace in the format of Azure's LLM inference traces: CSV of TIMESTAMP, ContextTokens and
    GeneratedTokens. It tells nothing of contents: no two prompts have a block in common.

    Raises TraceError.
    """
    arrivals: list[Arrival] = []
    fresh = count()
    began: datetime | None = None
    with path.open(newline="") as lines:
        for number, record in enumerate(islice(csv.DictReader(lines), requests), start=2):
            try:
                # Python knows microseconds; the trace has a digit more.
                at = datetime.fromisoformat(record["TIMESTAMP"][:26])
                prompt_tokens = int(record["ContextTokens"])
                output_tokens = int(record["GeneratedTokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}:{number}: {error!r}") from error
            began = began or at
            blocks = -(-prompt_tokens // TRACE_BLOCK_TOKENS)
            arrivals.append(
                Arrival(
                    at_seconds=(at - began).total_seconds(),
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    block_ids=tuple(islice(fresh, blocks)),
                )
            )
    if not arrivals:
        raise TraceError(f"{path}: no requests")
    return arrivals


def write(path: Path, arrivals: Sequence[Arrival]) -> None:
    """As `read` reads it."""
    with path.open("w") as lines:
        for arrival in arrivals:
            record = {
                "timestamp": round(arrival.at_seconds * 1_000),
                "input_length": arrival.prompt_tokens,
                "output_length": arrival.output_tokens,
                "hash_ids": arrival.block_ids,
            }
            lines.write(json.dumps(record) + "\n")


def spread(arrivals: Sequence[Arrival], seconds: float, *, seed: int) -> list[Arrival]:
    """The same requests, each later by some part of so many seconds: for a trace that tells times
    only so finely. In order of arrival; the same for the same seed."""
    random = Random(seed)
    later = [
        replace(arrival, at_seconds=arrival.at_seconds + random.random() * seconds)
        for arrival in arrivals
    ]
    return sorted(later, key=lambda arrival: arrival.at_seconds)


def with_system_prompt(arrivals: Sequence[Arrival], blocks: int) -> list[Arrival]:
    """The same requests with one long system prompt before all of them."""
    shared = tuple(range(_SHARED_ID, _SHARED_ID + blocks))
    return [
        replace(
            arrival,
            prompt_tokens=arrival.prompt_tokens + blocks * TRACE_BLOCK_TOKENS,
            block_ids=shared + arrival.block_ids,
        )
        for arrival in arrivals
    ]
