"""What the simulated engine makes of a prompt that is to be embedded."""

from __future__ import annotations

import math
import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.errors import ContextTooLong, InvalidRequest, SwitchgearError
from libs.engine.interface import EngineRequest, FinishReason, PoolingOptions, PoolingTask, Step
from libs.engine.sim.core.embedding import embedding
from libs.engine.sim.core.scheduler import Scheduler
from libs.engine.sim.core.timing import StepWork
from tests.libs.engine.sim.core.driving import (
    BLOCK_SIZE_TOKENS,
    SOURCE,
    Drive,
    limits,
    noting,
    request,
    scheduler,
)

DIMENSIONS = 48
prompts = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60)


def floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def cosine(one: list[int], other: list[int], dimensions: int = 384) -> float:
    pairs = zip(
        floats(embedding(one, dimensions)), floats(embedding(other, dimensions)), strict=True
    )
    return sum(a * b for a, b in pairs)


@given(prompts, st.integers(1, 100), st.randoms())
def test_a_vector_has_length_1_and_depends_on_the_tokens_alone(
    prompt: list[int], dimensions: int, random: Random
) -> None:
    vector = embedding(prompt, dimensions)
    assert math.hypot(*floats(vector)) == pytest.approx(1, abs=1e-5)
    assert len(vector) == 4 * dimensions
    random.shuffle(prompt)
    assert embedding(prompt, dimensions) == vector


def test_prompts_that_share_tokens_are_nearer_than_others() -> None:
    assert cosine([*range(20)], [*range(5, 25)]) > 0.6
    assert abs(cosine([*range(20)], [*range(100, 120)])) < 0.3


def to_embed(key: int, prompt: list[int], dimensions: int | None = None) -> EngineRequest:
    pooling = PoolingOptions(PoolingTask.EMBED, dimensions)
    return request(key, prompt, pooling=pooling)


class Embedding(Drive):
    """Keeps what came of each request."""

    def __init__(self, made: Scheduler) -> None:
        super().__init__(made)
        self.vectors: dict[int, bytes] = {}
        end_step = made.end_step

        def noted(now: float) -> Step:
            step = end_step(now)
            self.vectors |= {pooled.key: pooled.values for pooled in step.pooled}
            return step

        made.end_step = noted  # type: ignore[method-assign]


@given(st.lists(prompts, min_size=1, max_size=6), st.integers(16, 80))
def test_every_prompt_is_embedded_once_whatever_the_batch(
    batch: list[list[int]], chunk_tokens: int
) -> None:
    drive = Embedding(scheduler(chunk_tokens=chunk_tokens, embedding_dimensions=DIMENSIONS))
    drive.submit(*(to_embed(key, prompt) for key, prompt in enumerate(batch)))
    outcome = drive.run()
    assert drive.vectors == {key: embedding(prompt, DIMENSIONS) for key, prompt in enumerate(batch)}
    assert outcome.tokens == {}
    assert set(outcome.starts) == set(outcome.finishes) == set(range(len(batch)))
    assert {finish.reason for finish in outcome.finishes.values()} == {FinishReason.STOP}
    load = drive.scheduler.load()
    assert (load.running_requests, load.queued_prefill_tokens, load.active_kv_blocks) == (0, 0, 0)


def test_a_prompt_takes_the_time_of_its_prefill_less_what_is_cached() -> None:
    works: list[StepWork] = []
    made = Scheduler(
        limits(embedding_dimensions=DIMENSIONS), noting(works), SOURCE, engine_id="sim"
    )
    drive = Drive(made)
    drive.submit(to_embed(1, [*range(100)]))
    drive.run()
    assert [work.prefill_tokens for work in works] == [64, 36]
    assert not any(work.decoding_sequences for work in works)
    works.clear()
    drive.submit(to_embed(2, [*range(100)]))
    outcome = drive.run()
    assert outcome.starts[2].cached_tokens == 96
    assert [work.prefill_tokens for work in works] == [100 - 96]


@pytest.mark.parametrize(
    ("tokens", "dimensions", "error"),
    [
        (81, None, ContextTooLong),
        (10, 5, InvalidRequest),
    ],
)
def test_what_can_not_be_embedded_is_refused(
    tokens: int, dimensions: int | None, error: type[SwitchgearError]
) -> None:
    made = scheduler(total_kv_blocks=20, embedding_dimensions=DIMENSIONS)
    drive = Embedding(made)
    drive.submit(to_embed(1, [*range(tokens)], dimensions))
    drive.submit(to_embed(2, [*range(20 * BLOCK_SIZE_TOKENS)]))
    outcome = drive.run()
    assert type(outcome.finishes[1].error) is error
    assert set(drive.vectors) == {2}
