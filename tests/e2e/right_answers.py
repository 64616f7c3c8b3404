"""Clients who know what the answer must be, and take no other.

A simulated engine's token is a function of those before it, so the tokens that must come are
computed here. One that is lost, doubled or made from the wrong KV is seen, whoever made it.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from random import Random

import httpx
from tokenizers import Tokenizer

from libs.common.hashing import chain, local_hashes, sequence_hashes
from libs.engine.sim.core.tokens import fold
from libs.engine.sim.settings import SimSettings
from tests.fixtures.eventually import until

CLIENTS = 4
LONG_TOKENS = 480
"""Enough to be worth a prefill worker."""

BLOCK_SIZE_TOKENS = SimSettings().block_size_tokens
_SOURCE = SimSettings().token_source
_seeds = count()


class Frontends:
    """Whom to ask. As a load balancer does, asks nobody who is to stop."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = dict(urls)
        self._asked: Counter[str] = Counter()
        """Requests that have not begun to be answered."""

    @contextmanager
    def asking_one(self) -> Iterator[str]:
        """The URL of the one with fewest requests; it has answered when the body ends."""
        name = min(self._urls, key=lambda name: self._asked[name])
        self._asked[name] += 1
        try:
            yield self._urls[name]
        finally:
            self._asked[name] -= 1

    @asynccontextmanager
    async def without(self, name: str) -> AsyncIterator[None]:
        """Nobody asks this one while the body runs; what it was asked before it has begun to
        answer."""
        url = self._urls.pop(name)
        await until(lambda: not self._asked[name])
        yield
        self._urls[name] = url


@dataclass(frozen=True)
class Served:
    """How a right answer came about."""

    prefill_worker: str | None
    decode_worker: str
    cached_tokens: int


class Client:
    """Asks for completions of tokens."""

    def __init__(
        self, http: httpx.AsyncClient, frontends: Frontends, model: str, tokenizer: Tokenizer
    ) -> None:
        self._http = http
        self._frontends = frontends
        self._model = model
        self._tokenizer = tokenizer

    async def ask(
        self, prompt: Sequence[int], tokens: int, begun: asyncio.Event | None = None
    ) -> Served:
        """Sets `begun` at the first token. Raises AssertionError for a call that fails and for a
        wrong answer."""
        text, usage = "", None
        async with self._streaming(prompt, tokens) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    if begun is not None:
                        begun.set()
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += "".join(choice["text"] for choice in event["choices"])
                    usage = event["usage"] or usage
        right = _whole_characters(self._tokenizer.decode(answer_to(prompt, tokens)))
        assert usage is not None, f"the answer ended after {len(text)} of {len(right)} characters"
        assert (_whole_characters(text), usage["completion_tokens"]) == (right, tokens)
        return Served(
            response.headers.get("x-switchgear-prefill-worker"),
            response.headers["x-switchgear-decode-worker"],
            usage["prompt_tokens_details"]["cached_tokens"],
        )

    async def leave_at_the_first_token(self, prompt: Sequence[int]) -> None:
        """Of an answer that would take a minute."""
        async with self._streaming(prompt, 5000) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return
        raise AssertionError("no token came")

    @asynccontextmanager
    async def _streaming(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[httpx.Response]:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._frontends.asking_one() as url:
            request = self._http.build_request("POST", f"{url}/v1/completions", json=body)
            response = await self._http.send(request, stream=True)
        try:
            assert response.status_code == 200, await response.aread()
            yield response
        finally:
            await response.aclose()


def _whole_characters(text: str) -> str:
    """Half a character at the very end has no text in a stream, and stands for one in a whole."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def new_prompt(tokens: int) -> list[int]:
    """One that nobody had before."""
    return Random(next(_seeds)).choices(range(1_000, 40_000), k=tokens)


def answer_to(prompt: Sequence[int], tokens: int) -> list[int]:
    """What simulated engines make of a prompt."""
    size = BLOCK_SIZE_TOKENS
    known = list(prompt)
    hashes = sequence_hashes(known, size)
    for _ in range(tokens):
        tail = len(known) % size
        state = hashes[-1] if hashes else 0
        for token in known[len(known) - tail :]:
            state = fold(state, token)
        known.append(_SOURCE.draw(state))
        if tail == size - 1:
            hashes += chain(local_hashes(known[-size:], size), hashes[-1] if hashes else None)
    return known[len(prompt) :]


@dataclass
class Load:
    """What clients have been answered so far."""

    answers: int = 0
    prefilled_elsewhere: int = 0
    from_cache: int = 0
    is_ending: bool = False

    async def send(self, client: Client, number: int) -> None:
        """Conversations of two turns, one after the other."""
        while not self.is_ending:
            prompt = new_prompt(LONG_TOKENS if number % 2 else 20 + number)
            for _ in range(2):
                tokens = 30 + 10 * number
                served = await client.ask(prompt, tokens)
                self.answers += 1
                self.prefilled_elsewhere += served.prefill_worker is not None
                self.from_cache += served.cached_tokens > 0
                prompt = [*prompt, *answer_to(prompt, tokens), *new_prompt(5)]


@asynccontextmanager
async def under_load(client: Client) -> AsyncIterator[Load]:
    """Clients ask for one thing after another while the body runs, and finish what they began."""
    load = Load()
    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(load.send(client, number))
        yield load
        load.is_ending = True
