"""The byte model, taught by its template and its special tokens to call tools and to reason."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer

from libs.common.model_files import checksum
from switchgear.discovery.v1 import discovery_pb2
from tests.services.frontend import byte_model

TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "Answer within <tool_call></tool_call>.\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'tool' %}{{ message.name }}: {% endif %}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def files(template: str = TEMPLATE, special: tuple[str, ...] = ()) -> dict[str, bytes]:
    """What GetModelFiles gives, with more special tokens."""
    plain = byte_model.files(template)
    tokenizer = Tokenizer.from_buffer(plain["tokenizer.json"])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    config = json.loads(plain["tokenizer_config.json"])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def card(
    instance_id: int, model_files: dict[str, bytes], *, tools: str = "", reasoning: str = ""
) -> discovery_pb2.ModelCard:
    """A worker's model card."""
    made = byte_model.card(instance_id, files_checksum=checksum(model_files))
    made.tool_parser, made.reasoning_parser = tools, reasoning
    return made
