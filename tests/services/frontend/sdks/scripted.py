"""A frontend whose models do as the last message tells them, for clients of all kinds.

It runs in a thread of its own, so that clients may block, and be processes of other languages.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path

from google.protobuf import json_format

from libs.common.errors import DeadlineExceeded, InvalidRequest, NoLiveInstance, Overloaded
from libs.common.model_files import checksum
from services.frontend.core.api_keys import new_key
from services.frontend.tokenizer import ModelTokenizer
from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2
from tests.fixtures.eventually import eventually, until
from tests.fixtures.servers import new_nats
from tests.services.frontend import byte_model, tool_model
from tests.services.frontend.fake_router import (
    LENGTH,
    STOP,
    Call,
    embeds,
    fake_router,
    never_answers,
)
from tests.services.frontend.frontends import Frontend, file_server, frontend
from tests.services.frontend.stored_keys import stored, write

START_SECONDS = 60
TOKENS_PER_STEP = 3
STEP_SECONDS = 0.01
"""Of what goes on forever, which must not flood those who read it."""

PLAIN = "plain"
"""A model that knows of neither tools nor reasoning."""
TALENTED = "talented"
"""One that calls tools as Hermes does, and reasons as Qwen3 does."""
VECTORS = "vectors"
"""One that embeds."""
TALENTED_FILES = tool_model.files()

KEY = new_key(b"k" * 32)
PLAIN_KEY = new_key(b"p" * 32)
"""For the plain model only."""
POOR_KEY = new_key(b"m" * 32)
"""For one token a minute, and more have been used."""

_TOLD = re.compile(r"(Say|Busy|Down|Fail|Never|Forever|Constraint|Sampling|Prompt)(?: (\d+))?: ?")

_TOKENIZERS = {
    PLAIN: byte_model.TOKENIZER,
    TALENTED: ModelTokenizer(TALENTED_FILES),
    VECTORS: byte_model.TOKENIZER,
}


class Script:
    """What the models do. They take the last thing they are told:

    Say: TEXT          answers with the text
    Constraint:        answers with the JSON schema that its output must follow
    Sampling:          answers with the sampling options, as JSON
    Prompt:            answers with all of the prompt
    Busy N: NAME       refuses the first N requests of that name for full queues
    Down N: NAME       refuses the first N requests of that name for want of workers
    Fail: TEXT         fails after the text
    Never:             takes the request and says nothing
    Forever:           goes on until it is cancelled

    What is to be embedded becomes its vector, unless it is Busy.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    async def __call__(self, call: Call) -> None:
        tokenizer = _TOKENIZERS[call.generation.model]
        prompt = tokenizer.decode(list(call.generation.token_ids))
        if call.generation.HasField("pooling") and not prompt.startswith("Busy"):
            await self._embed(call)
            return
        found = [*_TOLD.finditer(prompt)][-1]
        verb, number = found[1], int(found[2] or 0)
        rest = prompt[found.end() :].partition("<|im_end|>")[0]
        sampling, told = call.generation.sampling, f"{verb} {rest}"
        match verb:
            case "Busy" | "Down":
                self._times[told] += 1
                if self._times[told] > number and call.generation.HasField("pooling"):
                    await self._embed(call)
                elif self._times[told] > number:
                    await self._say(call, tokenizer, f"attempt {self._times[told]}")
                elif verb == "Busy":
                    call.fail(Overloaded("all queues are full", retry_after_seconds=0.5))
                else:
                    call.fail(NoLiveInstance("no worker", retry_after_seconds=0.5))
            case "Fail":
                call.route()
                call.send(tokenizer.encode(rest), starts=True)
                failure = DeadlineExceeded("took too long")
                call.send([], generation_pb2.FINISH_REASON_ERROR, error=failure)
            case "Never":
                await never_answers(call)
            case "Forever":
                call.route()
                is_first = True
                while not call.cancelled.is_set():
                    call.send(tokenizer.encode("on and "), starts=is_first)
                    is_first = False
                    await asyncio.sleep(STEP_SECONDS)
            case "Constraint":
                await self._say(call, tokenizer, sampling.constraint.json_schema)
            case "Sampling":
                await self._say(call, tokenizer, json_format.MessageToJson(sampling, indent=None))
            case "Prompt":
                await self._say(call, tokenizer, prompt)
            case _:
                await self._say(call, tokenizer, rest)

    async def _embed(self, call: Call) -> None:
        if call.generation.pooling.HasField("dimensions"):
            call.fail(InvalidRequest("its vectors can't be cut short", param="dimensions"))
        else:
            await embeds()(call)

    async def _say(self, call: Call, tokenizer: ModelTokenizer, text: str) -> None:
        call.route()
        answer = [*tokenizer.encode(text), byte_model.END_TOKEN]
        limit = call.generation.stopping.max_tokens
        reason = LENGTH if len(answer) > limit else STOP
        answer = answer[:limit]
        for begin in range(0, len(answer), TOKENS_PER_STEP):
            end = begin + TOKENS_PER_STEP
            finish = reason if end >= len(answer) else None
            call.send(answer[begin:end], finish, starts=begin == 0, cached=4)
            await asyncio.sleep(0)


def _card(
    name: str, instance_id: int, tools: str = "", reasoning: str = ""
) -> discovery_pb2.ModelCard:
    files = TALENTED_FILES if name == TALENTED else byte_model.FILES
    card = byte_model.card(
        instance_id, model=name, files_checksum=checksum(files), embeds=name == VECTORS
    )
    card.tool_parser, card.reasoning_parser = tools, reasoning
    return card


class Served:
    """Two frontends, while the process does something else. One of them has API keys and keeps
    responses, if it is told nothing else."""

    def __init__(self, folder: Path) -> None:
        self._ready: Future[Sequence[Frontend]] = Future()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(folder)))
        self._thread.start()
        self._open, self._keyed = self._ready.result(START_SECONDS)

    @property
    def url(self) -> str:
        """Of the frontend that asks for no keys."""
        return self._open.url

    @property
    def keyed_url(self) -> str:
        return self._keyed.url

    async def _serve(self, folder: Path) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        keys = folder / "keys.json"
        write(
            keys,
            stored(KEY),
            stored(PLAIN_KEY, "plain", models=[PLAIN]),
            stored(POOR_KEY, "poor", tokens_per_minute=1),
        )
        try:
            async with AsyncExitStack() as stack:
                router = await stack.enter_async_context(fake_router(Script()))
                _, plain = await stack.enter_async_context(file_server(instance_id=1))
                _, talented = await stack.enter_async_context(file_server(TALENTED_FILES, 2))
                cards = [_card(PLAIN, 1), _card(TALENTED, 2, "hermes", "qwen3"), _card(VECTORS, 1)]
                nats = new_nats(folder, has_jetstream=True)
                stack.callback(nats.stop)
                await asyncio.to_thread(nats.start)
                keyed = {"api_keys": str(keys), "response_store": "nats", "nats_url": nats.url}
                by_name: dict[str, dict[str, str]] = {"open": {}, "keyed": keyed}
                started = [
                    await stack.enter_async_context(
                        frontend(
                            folder / name,
                            [router],
                            cards=cards,
                            workers=[plain, talented],
                            **settings,
                        )
                    )
                    for name, settings in by_name.items()
                ]
                for one in started:
                    await until(lambda one=one: len([*one.models.served()]) == len(cards))  # type: ignore[misc]
                    await one.until_ready()
                # From here on the poor key is in debt.
                body = {"model": PLAIN, "prompt": "Say: much"}
                spent = await started[1].client.post(
                    "/v1/completions", json=body, headers={"x-api-key": POOR_KEY}
                )
                assert spent.status_code == 200, spent.text

                async def keeps_responses() -> bool:
                    headers = {"x-api-key": KEY}
                    url = f"/v1/responses/resp-{0:032x}"
                    return (await started[1].client.get(url, headers=headers)).status_code == 404

                await eventually(keeps_responses)
                self._ready.set_result(started)
                await self._stop.wait()
                # Whoever left has been noticed, and nothing of theirs goes on.
                for one in started:
                    await until(lambda one=one: one.sessions.in_flight == 0)  # type: ignore[misc]
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive()
