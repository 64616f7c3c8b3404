"""The table of what clients do, cases.json, and what is expected of it.

A case has
  name      what it is about
  call      the SDK's method, with `body` as its named arguments or `args` as the others
  how       "raw" for the answer with its headers, "final" for a stream put together by the SDK,
            "leave" for a stream that is closed after a few events
  extra_body, headers, timeout_seconds, retries    as SDKs have them
  key       "good", "plain", "poor" or "wrong": at the frontend that asks for keys; "nobody": at a
            port where nobody listens
  expect    values in the result, by path
  error     class, status, code and param of the exception
  node      what is to be expected there instead

What a runner makes of a call is {"result": ...}, or {"error": ...} with the same four fields. The
result of a stream is its `events`, the `last` of them, their `types` without repetition, and the
`text`, `reasoning` and `calls` that they hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("cases.json").read_text())
NAMES = [case["name"] for case in CASES]
BY_NAME = dict(zip(NAMES, CASES, strict=True))

NODE_CLASSES = {"APITimeoutError": "APIConnectionTimeoutError"}
"""Where the SDKs' names for errors differ."""


def streamed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a stream."""
    texts, thoughts = [], []
    types: list[str] = []
    calls: dict[int, str] = {}
    for event in events:
        if (kind := event.get("type")) and types[-1:] != [kind]:
            types.append(kind)
        if kind == "response.output_text.delta":
            texts.append(event["delta"])
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            texts.append(choice.get("text") or delta.get("content") or "")
            thoughts.append(delta.get("reasoning") or "")
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                known = calls.get(call["index"], "")
                calls[call["index"]] = known + function.get("name", "") + function["arguments"]
    return {
        "events": events,
        "last": events[-1],
        "types": types,
        "text": "".join(texts),
        "reasoning": "".join(thoughts),
        "calls": list(calls.values()),
    }


def check(case: dict[str, Any], outcome: dict[str, Any], classes: dict[str, str]) -> None:
    """Fails unless this is what the case expects."""
    if "error" in case:
        expected = dict(case["error"])
        expected["class"] = classes.get(expected["class"], expected["class"])
        assert outcome.get("error") == expected, outcome
        return
    assert "result" in outcome, outcome
    for path, wanted in case["expect"].items():
        found = at(outcome["result"], path)
        match wanted:
            case {"pattern": pattern}:
                assert re.search(pattern, found, re.DOTALL), (path, found)
            case {"length": length}:
                assert len(found) == length, (path, found)
            case _:
                assert found == wanted, (path, found)


def at(value: Any, path: str) -> Any:
    """What is at a path such as choices.0.text."""
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def for_client(case: dict[str, Any], client: str) -> dict[str, Any]:
    """The case with what must differ between clients of one server."""
    parsed: dict[str, Any] = json.loads(json.dumps(case).replace("{client}", client))
    parsed.update(parsed.pop(client, {}))
    return parsed
