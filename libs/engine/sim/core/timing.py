"""How long an engine step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes."""

    prefill_tokens: int
    decoding_sequences: int
    """Sequences that get their next token by computing just the last one."""
    kv_usage: float
    """What of the device's KV the decoding sequences read, 0 to 1: their tokens as a part of all
    that it has room for. A block that several of them share is read for each."""


TimingModel = Callable[[StepWork], float]
"""Seconds that a step of such work takes."""


def default(work: StepWork) -> float:
    """8,000 prompt tokens a second, and 6.0 + 0.35 ms a sequence for the step's decode part."""
    decode_ms = 6.0 + 0.35 * work.decoding_sequences if work.decoding_sequences else 0.0
    return work.prefill_tokens / 8_000 + decode_ms / 1_000


def fixed(step_ms: float) -> TimingModel:
    """Every step that decodes takes the same time; prompts cost nothing."""

    def step_seconds(work: StepWork) -> float:
        return step_ms / 1_000 if work.decoding_sequences else 0.0

    return step_seconds


def dynamo_mocker(work: StepWork) -> float:
    """The polynomials of NVIDIA Dynamo's mocker, to compare the two side by side.

    They were fitted to steps of at most 8,192 prompt tokens, which is its chunk size too.
    """
    seconds = 0.0
    if n := work.prefill_tokens:
        seconds += (4.21e-7 * n**2 + 0.01518 * n + 16.50) / 1_000
    if work.decoding_sequences:
        p = work.kv_usage
        seconds += (-25.74 * p**2 + 54.01 * p + 5.74) / 1_000
    return seconds
