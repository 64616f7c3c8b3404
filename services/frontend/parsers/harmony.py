"""gpt-oss's harmony: messages with a channel, each for the user, for a tool, or the model's own.

    <|channel|>analysis<|message|>Thinking.<|end|><|start|>assistant<|channel|>commentary
    to=functions.f <|constrain|>json<|message|>{...}<|call|>

The prompt ends with <|start|>assistant, so an answer begins within a header. Format:
https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import regex

from services.frontend.parsers.events import Output
from services.frontend.parsers.stage import find_mark

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"

MARKS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)

_TO = r"\s{0,8}to=(?P<to>[\w.\-]{1,256})"
_HEADER = regex.compile(
    rf"\s{{0,8}}(?:<\|start\|>)?(?:assistant)?(?:{_TO})?"
    rf"\s{{0,8}}(?:<\|channel\|>\s{{0,8}}(?P<channel>\w{{1,32}}))?(?:{_TO})?"
    r"\s{0,8}(?:<\|constrain\|>)?\s{0,8}\w{0,32}\s{0,8}<\|message\|>"
)
_REFUSED = regex.compile(r"(?:\s*<\|(?:start|channel)\|>)?")
"""What of a header that is none must be read as content, so that it is not taken for one again."""
_BUILT_IN = frozenset({"assistant", "browser", "container", "python"})
"""Recipients that are no function of the caller's."""


class HarmonyStage:
    """Reasoning, content and calls of a chain of messages."""

    def __init__(self, output: Output, *, offers_tools: bool) -> None:
        self._output = output
        self._offers_tools = offers_tools
        self._held = ""
        self._step = self._read_header
        self._write = output.content
        self._is_call = False
        self._arguments_begun = False
        self._kinds_seen: set[str] = set()

    def feed(self, text: str) -> None:
        self._held += text
        while self._held and self._step():
            pass

    def finish(self) -> None:
        held, self._held = self._held, ""
        if self._step == self._read_body:
            self._write(held)
        elif not held.lstrip().startswith((START, CHANNEL)):
            # Of a header that was begun nothing is text.
            self._output.content(held)
        self._end_message()

    def _read_header(self) -> bool:
        match = _HEADER.match(self._held, partial=True)
        if match is not None and match.partial:
            return False
        if match is None:
            self._begin_message("", "")
            refused = _REFUSED.match(self._held)
            end = refused.end() if refused else 0
            self._output.content(self._held[:end])
            self._held = self._held[end:]
        else:
            self._held = self._held[match.end() :]
            self._begin_message(match.group("channel") or "", match.group("to") or "")
        self._step = self._read_body
        return True

    def _begin_message(self, channel: str, recipient: str) -> None:
        is_built_in = recipient.partition(".")[0] in _BUILT_IN
        if recipient and not is_built_in and self._offers_tools:
            self._is_call = True
            self._output.call(recipient.removeprefix("functions."))
            self._write = self._write_arguments
        elif channel == "analysis" or is_built_in:
            self._begin_paragraph("reasoning")
            self._write = self._output.reasoning
        else:
            self._begin_paragraph("content")
            self._write = self._output.content

    def _begin_paragraph(self, kind: str) -> None:
        """Messages of one kind after each other become paragraphs."""
        if kind in self._kinds_seen:
            (self._output.reasoning if kind == "reasoning" else self._output.content)("\n")
        self._kinds_seen.add(kind)

    def _write_arguments(self, text: str) -> None:
        self._arguments_begun = self._arguments_begun or bool(text)
        self._output.arguments(text)

    def _read_body(self) -> bool:
        at, mark = find_mark(self._held, END, CALL, RETURN, START, CHANNEL)
        if at:
            self._write(self._held[:at])
            self._held = self._held[at:]
        if not mark:
            return False
        if mark not in (START, CHANNEL):
            self._held = self._held[len(mark) :]
        self._end_message()
        self._step = self._read_header
        return True

    def _end_message(self) -> None:
        if self._is_call and not self._arguments_begun:
            self._output.arguments("{}")
        if self._write == self._output.reasoning:
            self._output.end_reasoning()
        self._is_call = self._arguments_begun = False
        self._write = self._output.content
