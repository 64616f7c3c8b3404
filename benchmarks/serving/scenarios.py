"""What clients ask for. Pure."""

import json
import random
from dataclasses import dataclass

_ID_MARK = "@REQUEST@"
_WORDS = (
    *("the", "of", "and", "to", "in", "that", "was", "with", "for", "his", "from", "had", "are"),
    *("but", "not", "they", "which", "one", "were", "all", "her", "she", "there", "would", "their"),
    *("will", "when", "who", "him", "been", "has", "more", "if", "no", "out", "so", "said", "what"),
    *("people", "little", "state", "good", "world", "still", "own", "work", "long", "between"),
    *("through", "before", "because", "never", "should", "government", "different", "important"),
)
_SYSTEM_PROMPT = (
    "You are a helpful assistant of a travel agency. Answer briefly and politely, name prices in "
    "euros, and never promise what the agency does not offer. If you do not know, say so."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of load: that many clients, each sending its next request after an answer."""

    name: str
    clients: int
    output_tokens: int
    """What each request asks for and must get."""
    is_streamed: bool = True
    prompt_bytes: int = 0
    """Of the text that differs from request to request from its first word on; 0 is a short
    question behind a system prompt that all requests share."""
    run_length: int = 1
    """Runs are so many times longer, for answers that take seconds."""


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


_CHAT = [
    Scenario(name=f"chat, {_clients(clients)}", clients=clients, output_tokens=64)
    for clients in (1, 32, 128, 512)
]
_ONE_TOKEN = Scenario(name="one token, 64 clients", clients=64, output_tokens=1, is_streamed=False)
_LONG_PROMPTS = [
    Scenario(
        name=f"{kilobytes} KB prompts, {_clients(clients)}",
        clients=clients,
        output_tokens=16,
        prompt_bytes=kilobytes * 1000,
        run_length=2 if kilobytes > 100 else 1,
    )
    for kilobytes in (16, 220)
    for clients in (1, 32)
]

FULL = (*_CHAT, _ONE_TOKEN, *_LONG_PROMPTS)
QUICK = (_CHAT[0], _CHAT[2], _CHAT[3], _ONE_TOKEN, _LONG_PROMPTS[1])


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON request body in two halves: what makes a request unlike all others goes between."""

    before_id: str
    after_id: str

    def of_run(self, run_id: str) -> "Body":
        """For requests unlike those of other runs, which caches may still know."""
        return Body(f"{self.before_id}{run_id}-", self.after_id)

    def text(self, request_id: str) -> str:
        return f"{self.before_id}{request_id}{self.after_id}"


def body(scenario: Scenario, model_name: str, *, with_usage: bool = False) -> Body:
    """The same for every system."""
    request = {
        "model": model_name,
        "messages": _messages(scenario.prompt_bytes),
        "max_tokens": scenario.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": scenario.is_streamed,
    }
    if with_usage and scenario.is_streamed:
        request["stream_options"] = {"include_usage": True}
    before, after = json.dumps(request).split(_ID_MARK)
    return Body(before, after)


def _messages(prompt_bytes: int) -> list[dict[str, str]]:
    if not prompt_bytes:
        question = f"I am customer {_ID_MARK}. Which cities of Portugal can I visit in four days?"
        return [
            {"role": "system", "content": _SYSTEM_PROMPT},
            {"role": "user", "content": question},
        ]
    return [{"role": "user", "content": f"Document {_ID_MARK}: {filler_text(prompt_bytes)}"}]


def filler_text(length_bytes: int) -> str:
    """English words in the same random order on every call."""
    chooser = random.Random(0)
    words: list[str] = []
    length = 0
    while length < length_bytes:
        words.append(chooser.choice(_WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)[:length_bytes]
