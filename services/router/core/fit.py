"""Whether a model's workers are alike, as they have to be to share prompts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from services.router.core.agreement import Reason

T = TypeVar("T", str, int)


class Make(NamedTuple):
    """What workers of one model have to agree on."""

    files_checksum: str
    """Of tokenizer, template and configuration."""
    block_size_tokens: int

    def lacks(self, model: Make) -> frozenset[Reason]:
        """Why a worker of this make does not fit its model."""
        lacking = set()
        if self.files_checksum != model.files_checksum:
            lacking.add(Reason.TOKENIZER_OR_TEMPLATE)
        if self.block_size_tokens != model.block_size_tokens:
            lacking.add(Reason.BLOCK_SIZE)
        return frozenset(lacking)


def make_of_model(makes: Sequence[Make]) -> Make:
    """What most of a model's workers have, of which there is at least one; where no more than half
    agree, what the first has."""
    return Make(
        _common([make.files_checksum for make in makes]),
        _common([make.block_size_tokens for make in makes]),
    )


def _common(values: Sequence[T]) -> T:
    value, times = Counter(values).most_common(1)[0]
    return value if 2 * times > len(values) else values[0]
