"""Settings that can be changed while the router runs: in etcd, under config/router/.

A key is the setting's name, or the name and a model that it is for; a value is JSON. What can't be
used is rejected with a log line, and the setting stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from google.protobuf import json_format, struct_pb2
from prometheus_client import Gauge
from pydantic import TypeAdapter, ValidationError

from libs.common import logs
from libs.common.discovery import Key, Table
from services.router.config import POLICY_SETTINGS, RouterSettings
from services.router.core.decision import Policy

log = logs.get(__name__)

LIVE_KEYS = POLICY_SETTINGS
"""All that decisions depend on."""

REVISION = Gauge(
    "switchgear_router_settings_revision",
    "Revision of etcd up to which live settings have been followed",
)
REJECTED = Gauge(
    "switchgear_router_settings_rejected", "Live settings whose value in etcd can't be used"
)


def _adapter(name: str) -> TypeAdapter[Any]:
    """Checks one setting exactly as at start."""
    field = RouterSettings.model_fields[name]
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    return TypeAdapter(annotation)


_ADAPTERS = {name: _adapter(name) for name in LIVE_KEYS}


@dataclass(frozen=True, slots=True)
class Setting:
    """One value in force."""

    name: str
    model: str
    """Empty: for all models that have none of their own."""
    value: Any
    is_live: bool


class LiveSettings:
    """The settings of the start, and what etcd says in place of some."""

    def __init__(self, start: RouterSettings, table: Table[struct_pb2.Value]) -> None:
        self.start = start
        self.rejected: dict[Key, tuple[Any, str]] = {}
        """Values that can't be used, and why."""
        self._table = table
        self._seen: Mapping[Key, struct_pb2.Value] = {}
        self._values: dict[Key, Any] = {}
        """Good ones."""
        self._policies: dict[str, Policy] = {}
        self._default = start.policy
        table.on_change(self._take)
        self._take()
        REVISION.set_function(lambda: self._table.revision)

    @property
    def revision(self) -> int:
        """Of etcd, up to which its settings are in force; 0 before it was first read."""
        return self._table.revision

    def policy(self, model: str) -> Policy:
        """What decisions on the model weigh now."""
        return self._policies.get(model, self._default)

    def settings(self) -> list[Setting]:
        """All that can be changed, with the values in force."""
        general = [
            Setting(
                name,
                "",
                self._values.get((name,), getattr(self.start, name)),
                (name,) in self._values,
            )
            for name in LIVE_KEYS
        ]
        special = [
            Setting(key[0], key[1], value, True)
            for key, value in sorted(self._values.items())
            if len(key) == 2
        ]
        return general + special

    def _take(self) -> None:
        entries = self._table.entries
        for key in self._seen.keys() - entries.keys():
            self.rejected.pop(key, None)
            if key in self._values:
                log.info("live setting removed", key="/".join(key), was=self._values.pop(key))
        for key, message in entries.items():
            if self._seen.get(key) != message:
                self._take_one(key, json_format.MessageToDict(message))
        self._seen = dict(entries)
        REJECTED.set(len(self.rejected))
        general = {key[0]: value for key, value in self._values.items() if len(key) == 1}
        self._default = self.start.model_copy(update=general).policy
        self._policies = {}
        for model in {key[1] for key in self._values if len(key) == 2}:
            own = {key[0]: value for key, value in self._values.items() if key[1:] == (model,)}
            self._policies[model] = self.start.model_copy(update=general | own).policy

    def _take_one(self, key: Key, raw: Any) -> None:
        try:
            value = _checked(key, raw)
        except ValueError as error:
            self.rejected[key] = raw, str(error)
            log.error(
                "live setting rejected",
                key="/".join(key),
                value=raw,
                error=str(error),
                stays=self._values.get(key),
            )
            return
        self.rejected.pop(key, None)
        self._values[key] = value
        log.info("live setting", key="/".join(key), value=value)


def _checked(key: Key, raw: Any) -> Any:
    """Raises ValueError, saying what is wrong."""
    if len(key) not in (1, 2) or key[0] not in _ADAPTERS:
        raise ValueError(f"no live setting; they are {', '.join(LIVE_KEYS)}")
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)  # JSON knows one kind of number.
    try:
        return _ADAPTERS[key[0]].validate_python(raw, strict=True)
    except ValidationError as error:
        raise ValueError("; ".join(issue["msg"] for issue in error.errors())) from None


def as_json(value: Any) -> str:
    """A setting's value as it would be written in etcd."""
    return orjson.dumps(value).decode()
