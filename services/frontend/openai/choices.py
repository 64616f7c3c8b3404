"""The choices of an answer, each with a completion of its own, and their chunks in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from services.frontend.completion import Completion
from services.frontend.core.logprobs import TokenLogprobs
from services.frontend.openai.formats import ChoiceShape

ReadT = TypeVar("ReadT")


class ChunkSource(Protocol[ReadT]):
    """Server-sent events as they come. Not for concurrent readers.

    In two parts, since another coroutine for each token would be felt.
    """

    @property
    def is_finished(self) -> bool:
        """The last chunk has been made."""

    def read(self) -> Awaitable[ReadT]:
        """Waits for something to happen. Raises the SwitchgearError that ended a request."""

    def chunk_of(self, read: ReadT) -> bytes:
        """The events of what was read last, which may be none."""


class Choice:
    """One completion in the shape of an answer's choice."""

    def __init__(
        self,
        completion: Completion,
        shape: ChoiceShape,
        *,
        echoed: Sequence[str] | None,
        has_logprobs: bool,
    ) -> None:
        """`echoed` are the texts of the prompt's tokens, to come before the answer."""
        self.completion = completion
        self._shape = shape
        self._echoed = echoed
        self._has_logprobs = has_logprobs
        self._is_begun = False
        self._is_plain = False
        """Whether there is nothing to tell but text, until the end."""

    @property
    def is_finished(self) -> bool:
        return self.completion.is_finished

    def read(self) -> Awaitable[str]:
        return self.completion.read()

    def chunk_of(self, read: str) -> bytes:
        if self._is_plain and not self.completion.finish_reason:
            return self._shape.text_chunk(read) if read else b""
        chunk = b""
        if not self._is_begun:
            self._is_begun = True
            self._is_plain = not self._has_logprobs
            chunk = self._shape.first_chunk()
            if self._echoed is not None:
                chunk += self._shape.text_chunk("".join(self._echoed), self._echoed_logprobs())
        logprobs = self._take_logprobs() if self._has_logprobs else None
        if read or logprobs:
            chunk += self._shape.text_chunk(read, logprobs)
        if self.is_finished:
            chunk += self._shape.last_chunk(self.completion)
        return chunk

    async def read_whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        texts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        while not self.is_finished:
            texts.append(await self.completion.read())
            if self._has_logprobs:
                logprobs += self._take_logprobs()
        text = "".join([*(self._echoed or ()), *texts])
        found = [*(self._echoed_logprobs() or ()), *logprobs] if self._has_logprobs else None
        return self._shape.whole(text, found, self.completion)

    def _take_logprobs(self) -> list[TokenLogprobs]:
        found = self.completion.take_logprobs()
        if not self._echoed:
            return found
        characters = sum(map(len, self._echoed))
        return [replace(token, begin=characters + token.begin) for token in found]

    def _echoed_logprobs(self) -> list[TokenLogprobs] | None:
        if not self._has_logprobs or self._echoed is None:
            return None
        return self.completion.prompt_logprobs(self._echoed)


@asynccontextmanager
async def merged(choices: Sequence[Choice]) -> AsyncIterator[ChunkSource[Any]]:
    """The chunks of all choices, as they come. A choice is read on once its chunk was taken, so
    that a client that reads slowly gets longer chunks and not more of them."""
    if len(choices) == 1:
        yield choices[0]
        return
    merging = _Merging(choices)
    try:
        yield merging
    finally:
        await merging.close()


async def _read(choice: Choice) -> str:
    return await choice.read()


class _Merging:
    """A task for each choice that has not ended, in order of the choices."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._reading = {asyncio.create_task(_read(choice)): choice for choice in choices}

    @property
    def is_finished(self) -> bool:
        return not self._reading

    async def read(self) -> list[tuple[Choice, str]]:
        await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
        found = []
        reading: dict[asyncio.Task[str], Choice] = {}
        for task, choice in self._reading.items():
            if not task.done():
                reading[task] = choice
                continue
            found.append((choice, task.result()))
            if not choice.is_finished:
                reading[asyncio.create_task(_read(choice))] = choice
        self._reading = reading
        return found

    def chunk_of(self, read: list[tuple[Choice, str]]) -> bytes:
        return b"".join([choice.chunk_of(text) for choice, text in read])

    async def close(self) -> None:
        """Ends the reading; what was not read is lost."""
        tasks = list(self._reading)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
