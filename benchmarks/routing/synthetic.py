"""Made-up conversations: several turns each, behind system prompts that many of them share."""

from __future__ import annotations

from itertools import count, islice
from random import Random

from benchmarks.routing.trace import TRACE_BLOCK_TOKENS, Arrival

APPLICATIONS = 24
"""Each with its system prompt, and used the less the later it comes (as 1/n)."""
SYSTEM_PROMPT_BLOCKS = (1, 8)
CONVERSATIONS_A_SECOND = 1.0
MEAN_TURNS = 5
MAX_TURNS = 40
MEAN_PAUSE_SECONDS = 30.0
"""Between an answer and the next question."""
SECONDS_PER_TOKEN = 0.02
"""That an answer is taken to need."""
FIRST_TOKENS = (100, 4_000)
"""Of what a user begins with."""
QUESTION_TOKENS = (50, 1_500)
MEAN_ANSWER_TOKENS = 250
MAX_ANSWER_TOKENS = 2_000


def conversations(count_conversations: int, *, seed: int) -> list[Arrival]:
    """In order of arrival, at a moderate load for some eight workers; the same for the same seed.

    Each prompt is all that was said before and something new, answers included: in a replay those
    count as new, too, since engines produce other tokens there.
    """
    random = Random(seed)
    fresh = count()
    system_prompts = [
        tuple(islice(fresh, random.randint(*SYSTEM_PROMPT_BLOCKS))) for _ in range(APPLICATIONS)
    ]
    popularity = [1 / number for number in range(1, APPLICATIONS + 1)]
    arrivals = []
    began = 0.0
    for _ in range(count_conversations):
        began += random.expovariate(CONVERSATIONS_A_SECOND)
        at = began
        [blocks] = random.choices(system_prompts, popularity)
        system_tokens = len(blocks) * TRACE_BLOCK_TOKENS
        said_tokens = random.randint(*FIRST_TOKENS)
        for _ in range(min(MAX_TURNS, 1 + int(random.expovariate(1 / MEAN_TURNS)))):
            prompt_tokens = system_tokens + said_tokens
            missing = -(-prompt_tokens // TRACE_BLOCK_TOKENS) - len(blocks)
            blocks += tuple(islice(fresh, missing))
            answer_tokens = 1 + int(random.expovariate(1 / MEAN_ANSWER_TOKENS))
            answer_tokens = min(MAX_ANSWER_TOKENS, answer_tokens)
            arrivals.append(Arrival(at, prompt_tokens, answer_tokens, blocks))
            at += answer_tokens * SECONDS_PER_TOKEN + random.expovariate(1 / MEAN_PAUSE_SECONDS)
            said_tokens += answer_tokens + random.randint(*QUESTION_TOKENS)
    return sorted(arrivals, key=lambda arrival: arrival.at_seconds)
