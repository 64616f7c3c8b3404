import pytest

from libs.engine.sim.core import timing
from libs.engine.sim.core.timing import StepWork


def work(
    *, prefill_tokens: int = 0, decoding_sequences: int = 0, kv_usage: float = 0.0
) -> StepWork:
    return StepWork(prefill_tokens, decoding_sequences, kv_usage)


def test_default_adds_prompt_tokens_and_batch_size() -> None:
    assert timing.default(work(prefill_tokens=2_000)) == pytest.approx(0.250)
    assert timing.default(work(decoding_sequences=10)) == pytest.approx(0.0095)
    assert timing.default(work(prefill_tokens=80, decoding_sequences=1)) == pytest.approx(0.01635)


def test_fixed_takes_the_same_time_for_any_batch_and_none_for_prompts() -> None:
    step_seconds = timing.fixed(6.0)
    assert step_seconds(work(decoding_sequences=1)) == pytest.approx(0.006)
    assert step_seconds(work(decoding_sequences=200, prefill_tokens=2_048)) == pytest.approx(0.006)
    assert step_seconds(work(prefill_tokens=2_048)) == 0.0


@pytest.mark.parametrize(
    ("done", "milliseconds"),
    [
        (work(prefill_tokens=1), 16.515180421),
        (work(prefill_tokens=8_192), 4.21e-7 * 8_192**2 + 0.01518 * 8_192 + 16.50),
        (work(decoding_sequences=3), 5.74),
        (work(decoding_sequences=3, kv_usage=0.5), -25.74 / 4 + 54.01 / 2 + 5.74),
        (work(decoding_sequences=3, kv_usage=1.0), 34.01),
        (work(prefill_tokens=1, decoding_sequences=1, kv_usage=1.0), 16.515180421 + 34.01),
    ],
)
def test_dynamo_mocker_follows_its_two_polynomials(done: StepWork, milliseconds: float) -> None:
    assert timing.dynamo_mocker(done) == pytest.approx(milliseconds / 1_000)
