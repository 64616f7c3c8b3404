"""Calls by litellm, in an environment of its own: python litellm_calls.py URL > outcomes.

Prints JSON: what each call came to, by its name.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def calls(url: str) -> dict[str, Any]:
    def ask(text: str, model: str = "plain", provider: str = "openai", **more: Any) -> Any:
        base = f"{url}/v1" if provider == "openai" else url
        return litellm.completion(
            model=f"{provider}/{model}",
            messages=[{"role": "user", "content": text}],
            api_base=base,
            api_key="none",
            num_retries=0,
            max_retries=0,
            **more,
        )

    def joined(chunks: Any) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def later() -> str:
        answer = await litellm.acompletion(
            model="openai/plain",
            messages=[{"role": "user", "content": "Say: async"}],
            api_base=f"{url}/v1",
            api_key="none",
        )
        return str(answer.choices[0].message.content)

    found = {
        "answer": ask("Say: Hello").choices[0].message.content,
        "stream": joined(ask("Say: Hello there", stream=True)),
        "async": asyncio.run(later()),
        "tool": ask(f"Say: {CALL}", "talented", tools=[TOOL])
        .choices[0]
        .message.tool_calls[0]
        .function.arguments,
        "anthropic": ask("Say: Hello", provider="anthropic", max_tokens=50)
        .choices[0]
        .message.content,
        "anthropic stream": joined(
            ask("Say: Hello", provider="anthropic", max_tokens=50, stream=True)
        ),
    }
    embedded = litellm.embedding(
        model="openai/vectors", input=["Hi", "Hello"], api_base=f"{url}/v1", api_key="none"
    )
    found["embeddings"] = [one["embedding"][0] for one in embedded.data]
    for name, model, text in (("unknown", "nobody", "Hi"), ("busy", "plain", "Busy 9: litellm")):
        try:
            ask(text, model)
        except Exception as error:
            found[name] = type(error).__name__
    return found


litellm.telemetry = False
litellm.suppress_debug_info = True
print(json.dumps(calls(sys.argv[1])))
