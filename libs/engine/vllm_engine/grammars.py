"""Runs in the engine core's process: lets a constraint go on where an earlier worker left it.

A request that migrates brings its output along as prompt. vLLM would begin the grammar anew after
that, and a JSON object half written would be followed by a whole one.
"""

from __future__ import annotations

from typing import Any

from libs.engine.vllm_engine.requests import PRODUCED_TOKENS


def install() -> None:
    """Has every grammar take in the output that its request brings along."""
    from vllm.v1.structured_output import StructuredOutputManager

    create_grammar = StructuredOutputManager._create_grammar

    def create_and_go_on(self: Any, request: Any) -> Any:
        grammar = create_grammar(self, request)
        count = (request.sampling_params.extra_args or {}).get(PRODUCED_TOKENS, 0)
        produced = request.prompt_token_ids[-count:] if count else []
        if produced and not grammar.accept_tokens(request.request_id, produced):
            raise ValueError("what was produced does not match the constraint")
        return grammar

    StructuredOutputManager._create_grammar = create_and_go_on
