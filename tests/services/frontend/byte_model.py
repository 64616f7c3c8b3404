"""A tiny real model: one token for each byte, a few special tokens, a ChatML template."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from libs.common.model_files import checksum
from services.frontend.tokenizer import ModelTokenizer
from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2

NAME = "byte-model"
CONTEXT_TOKENS = 2000
BLOCK_TOKENS = 4

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def files(template: str = TEMPLATE) -> dict[str, bytes]:
    """What GetModelFiles gives."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|bos|>", "<|im_start|>", "<|im_end|>")]
    )
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config | {"chat_template": template}).encode(),
    }


FILES = files()
CHECKSUM = checksum(FILES)
TOKENIZER = ModelTokenizer(FILES)


def tokens(text: str) -> list[int]:
    """One for each byte of plain text."""
    return TOKENIZER.encode(text)


END_TOKEN = tokens("<|im_end|>")[0]


def card(
    instance_id: int,
    role: discovery_pb2.Role.ValueType = discovery_pb2.ROLE_DECODE_WORKER,
    *,
    model: str = NAME,
    aliases: tuple[str, ...] = (),
    needs: tuple[discovery_pb2.Role.ValueType, ...] = (),
    created_unix_seconds: int = 1_700_000_000,
    context_length_tokens: int = CONTEXT_TOKENS,
    files_checksum: str = CHECKSUM,
    embeds: bool = False,
) -> discovery_pb2.ModelCard:
    """A worker's model card."""
    return discovery_pb2.ModelCard(
        instance_id=instance_id,
        role=role,
        model=model,
        aliases=aliases,
        needs=needs,
        context_length_tokens=context_length_tokens,
        kv_block_size_tokens=BLOCK_TOKENS,
        files_checksum=files_checksum,
        created_unix_seconds=created_unix_seconds,
        pooling_tasks=[generation_pb2.POOLING_TASK_EMBED] if embeds else [],
    )
