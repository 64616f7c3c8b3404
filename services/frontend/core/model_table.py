"""Which models there are and which can be served, from the model cards of the workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2

_DECODE = discovery_pb2.ROLE_DECODE_WORKER


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that at least one worker has loaded."""

    name: str
    aliases: tuple[str, ...] = ()
    missing: str = ""
    """What the model lacks to be served, for people; empty when the workers suffice."""
    context_length_tokens: int = 0
    """The smallest of the decode workers, since any of them may be chosen."""
    kv_block_size_tokens: int = 0
    files_checksum: str = ""
    created_unix_seconds: int = 0
    tool_parser: str = ""
    reasoning_parser: str = ""
    """Names of the formats that it writes in; empty for what its files tell."""
    pooling_tasks: tuple[generation_pb2.PoolingTask.ValueType, ...] = ()
    """What it does with prompts; empty: it generates."""
    instance_ids: tuple[int, ...] = ()
    """Workers that have the files."""


def known_models(cards: Iterable[discovery_pb2.ModelCard]) -> dict[str, KnownModel]:
    """All models by name.

    Decode workers should agree on files, block size and tasks. Where they do not, the one that
    loaded first decides, so that every frontend decides the same and a new worker changes nothing.
    """
    by_model: dict[str, list[discovery_pb2.ModelCard]] = {}
    for card in cards:
        by_model.setdefault(card.model, []).append(card)
    return {name: _known(name, found) for name, found in sorted(by_model.items())}


def _known(name: str, cards: list[discovery_pb2.ModelCard]) -> KnownModel:
    cards.sort(key=lambda card: (card.created_unix_seconds, card.instance_id))
    aliases = tuple(sorted({alias for card in cards for alias in card.aliases} - {name}))
    roles = {card.role for card in cards}
    decoders = [card for card in cards if card.role == _DECODE]
    if not decoders:
        return KnownModel(name=name, aliases=aliases, missing="a decode worker")
    satisfied = [card for card in decoders if roles.issuperset(card.needs)]
    leader = (satisfied or decoders)[0]
    needed = sorted(set(leader.needs) - roles)
    return KnownModel(
        name=name,
        aliases=aliases,
        missing=" and ".join(f"a {_role(role)}" for role in needed),
        context_length_tokens=min(card.context_length_tokens for card in satisfied or decoders),
        kv_block_size_tokens=leader.kv_block_size_tokens,
        files_checksum=leader.files_checksum,
        created_unix_seconds=leader.created_unix_seconds,
        tool_parser=leader.tool_parser,
        reasoning_parser=leader.reasoning_parser,
        pooling_tasks=tuple(leader.pooling_tasks),
        instance_ids=tuple(
            card.instance_id for card in cards if card.files_checksum == leader.files_checksum
        ),
    )


def _role(role: discovery_pb2.Role.ValueType) -> str:
    return discovery_pb2.Role.Name(role).removeprefix("ROLE_").lower().replace("_", " ")
