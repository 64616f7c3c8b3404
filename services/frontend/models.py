"""The models that can be served now, kept up to date with the workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from libs.common import logs
from libs.common.discovery import Table
from libs.common.errors import ModelNotFound, NoLiveInstance, TaskNotSupported
from libs.common.tasks import background
from services.frontend.core.model_table import KnownModel, known_models
from services.frontend.model_files import ModelFileStore
from services.frontend.parsers.formats import ModelFormat, chosen
from services.frontend.tokenizer import ModelTokenizer
from switchgear.common.v1 import generation_pb2
from switchgear.discovery.v1 import discovery_pb2

log = logs.get(__name__)

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with all that it takes to serve it."""

    facts: KnownModel
    tokenizer: ModelTokenizer

    @property
    def name(self) -> str:
        return self.facts.name

    def check_generates(self) -> None:
        """Raises TaskNotSupported."""
        if self.facts.pooling_tasks:
            raise TaskNotSupported(
                f"The model '{self.name}' only supports embeddings and does not generate text",
                param="model",
            )

    def check_embeds(self) -> None:
        """Raises TaskNotSupported."""
        if generation_pb2.POOLING_TASK_EMBED not in self.facts.pooling_tasks:
            raise TaskNotSupported(
                f"The model '{self.name}' generates text and does not support embeddings",
                param="model",
            )

    @property
    def format(self) -> ModelFormat:
        """How it writes reasoning and tool calls: as its worker says, or as its files tell."""
        return chosen(
            self.facts.tool_parser, self.facts.reasoning_parser, self.tokenizer.detected_format
        )


class Models:
    """Follows model cards; loads a tokenizer before it calls a model served."""

    def __init__(
        self,
        cards: Table[discovery_pb2.ModelCard],
        instances: Table[discovery_pb2.Instance],
        store: ModelFileStore,
        *,
        token_cache_bytes: int,
    ) -> None:
        self._cards = cards
        self._instances = instances
        self._store = store
        self._token_cache_bytes = token_cache_bytes
        self._known: dict[str, KnownModel] = {}
        self._aliases: dict[str, str] = {}
        self._tokenizers: dict[str, ModelTokenizer] = {}
        """By checksum of the files."""
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Keeps the models up to date while the body runs."""
        self._cards.on_change(self._refresh)
        # A worker's address may become known after its card.
        self._instances.on_change(self._changed.set)
        self._refresh()
        async with background(self._load_tokenizers()):
            yield

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls the listener whenever models come or go. It must not raise."""
        self._listeners.append(listener)

    def served(self) -> list[ServedModel]:
        """Models that can be served, by name."""
        return [model for name in self._known if isinstance(model := self._find(name), ServedModel)]

    def problem(self) -> str:
        """Why no model can be served, for people; empty when one can."""
        if self.served():
            return ""
        if not self._known:
            return "no worker has registered a model"
        return "; ".join(str(self._find(name)) for name in self._known)

    def get(self, name: str) -> ServedModel:
        """The model of that name or alias.

        Raises ModelNotFound for an unknown one and NoLiveInstance for one that can't be served now.
        """
        found = self._find(name)
        if isinstance(found, ServedModel):
            return found
        raise found

    def facts(self, name: str) -> tuple[KnownModel, str]:
        """What is known of the model of that name or alias, and why it can't be served now, empty
        when it can. Raises ModelNotFound."""
        found = self._find(name)
        if isinstance(found, ModelNotFound):
            raise found
        problem = "" if isinstance(found, ServedModel) else found.message
        return self._known[self.canonical_name(name)], problem

    def canonical_name(self, name: str) -> str:
        """The name of the known model of that name or alias; empty for an unknown one."""
        return name if name in self._known else self._aliases.get(name, "")

    def _find(self, name: str) -> ServedModel | ModelNotFound | NoLiveInstance:
        known = self._known.get(self.canonical_name(name))
        if known is None:
            return ModelNotFound(f"The model '{name}' does not exist", param="model")
        if known.missing:
            return NoLiveInstance(
                f"The model '{known.name}' is not ready: it lacks {known.missing}", param="model"
            )
        tokenizer = self._tokenizers.get(known.files_checksum)
        if tokenizer is None:
            return NoLiveInstance(
                f"The model '{known.name}' is not ready: its tokenizer is being loaded",
                param="model",
            )
        return ServedModel(known, tokenizer)

    def _refresh(self) -> None:
        self._known = known_models(self._cards.values())
        self._aliases = {
            alias: model.name for model in self._known.values() for alias in model.aliases
        }
        used = {model.files_checksum for model in self._known.values()}
        self._tokenizers = {
            checksum: loaded for checksum, loaded in self._tokenizers.items() if checksum in used
        }
        self._changed.set()
        self._notify()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    async def _load_tokenizers(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            missing = {
                model.files_checksum: model
                for model in self._known.values()
                if model.files_checksum and model.files_checksum not in self._tokenizers
            }
            if not all(await asyncio.gather(*map(self._load, missing.values()))):
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._changed.set)

    async def _load(self, model: KnownModel) -> bool:
        """Whether the tokenizer was loaded."""
        addresses = [
            instance.address
            for instance in self._instances.values()
            if instance.instance_id in model.instance_ids
        ]
        try:
            files = await self._store.get(model.files_checksum, model.name, addresses)
            tokenizer = await asyncio.to_thread(
                ModelTokenizer, files, cache_bytes=self._token_cache_bytes
            )
        except (NoLiveInstance, ValueError) as error:
            log.warning("tokenizer not loaded", model=model.name, error=str(error))
            return False
        self._tokenizers[model.files_checksum] = tokenizer
        log.info("tokenizer loaded", model=model.name, checksum=model.files_checksum)
        self._notify()
        return True
