"""Clients of all kinds, so that there is something to see: conversations that share prompts,
questions on long texts that are new, clients that leave, and calls that are wrong.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import httpx

CALL_SECONDS = 60.0
PAUSE_SECONDS = 0.2
"""Between a client's calls, at most."""
REFUSED_PAUSE_SECONDS = 1.0
"""After a call that was refused or failed."""

_TURNS = 3
_OUTPUT_TOKENS = (12, 40)
_SUBJECTS = ("turbines", "transformers", "relays")
_RULES = (
    "You answer questions on {} in a power station. Answer briefly, name your source, give figures "
    "with their units, say so when you are not sure, and never guess at voltages. "
)
_RULES_TIMES = 12
"""A system prompt of some 450 tokens: worth a prefill worker, and to be found again."""

_DOCUMENT_SENTENCES = 40


def document(title: str, sentences: int) -> list[dict[str, str]]:
    """A question on a text that nobody has any of, but those with that title; some 40 tokens for
    each sentence."""
    text = f"Case {title}. " + _RULES.format("switchgear") * sentences
    return [{"role": "user", "content": text}]


async def put_load(url: str, model: str, *, clients: int, seed: int) -> None:
    """Runs until cancelled. What is answered wrongly is for the metrics to show."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(
            base_url=url, timeout=CALL_SECONDS, limits=limits, trust_env=False
        ) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in range(clients):
            group.create_task(_Client(http, model, random.Random(f"{seed} {number}")).run())


class _Client:
    """One after the other of the kinds of clients."""

    def __init__(self, http: httpx.AsyncClient, model: str, chance: random.Random) -> None:
        self._http, self._model, self._chance = http, model, chance

    async def run(self) -> None:
        how_often = {
            self._conversation: 16,
            self._document: 16,
            self._leaves: 2,
            self._too_long: 1,
            self._unknown_model: 1,
        }
        while True:
            [kind] = self._chance.choices(list(how_often), list(how_often.values()))
            try:
                await kind()
                await asyncio.sleep(self._chance.uniform(0, PAUSE_SECONDS))
            except httpx.HTTPError:
                # Expected when queues are full or workers dead; the metrics count it.
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    async def _conversation(self) -> None:
        messages = self._first_messages()
        for _ in range(_TURNS):
            answer = "".join([text async for text in self._stream(messages)])
            question = f"And number {self._chance.randrange(1000)}?"
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            ]

    async def _document(self) -> None:
        async for _ in self._stream(document(str(self._chance.random()), _DOCUMENT_SENTENCES)):
            pass

    async def _leaves(self) -> None:
        async for _ in self._stream(self._first_messages()):
            return

    async def _too_long(self) -> None:
        await self._post({"messages": self._first_messages(), "max_tokens": 10**6})

    async def _unknown_model(self) -> None:
        await self._post({"model": "nobody-has-it", "messages": self._first_messages()})

    def _first_messages(self) -> list[dict[str, str]]:
        rules = _RULES.format(self._chance.choice(_SUBJECTS)) * _RULES_TIMES
        question = f"What about number {self._chance.randrange(10**6)}?"
        return [{"role": "system", "content": rules}, {"role": "user", "content": question}]

    async def _stream(self, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Texts of an answer as they come. Raises HTTPError when the call is refused."""
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._chance.randint(*_OUTPUT_TOKENS),
            "stream": True,
        }
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    for choice in event.get("choices", ()):
                        if text := choice["delta"].get("content"):
                            yield text

    async def _post(self, body: dict[str, object]) -> None:
        await self._http.post("/v1/chat/completions", json={"model": self._model, **body})
