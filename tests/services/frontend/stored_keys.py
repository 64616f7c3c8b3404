"""API keys as they are stored, and a file of them."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format

from services.frontend.core.api_keys import digest_of, new_key
from switchgear.access.v1 import access_pb2

GOOD = new_key(b"g" * 32)


def stored(key: str = GOOD, key_id: str = "good", **fields: object) -> access_pb2.ApiKey:
    parsed = {"key_id": key_id, "key_sha256": digest_of(key).hex(), "tenant": key_id} | fields
    return json_format.ParseDict(parsed, access_pb2.ApiKey())


def write(path: Path, *keys: access_pb2.ApiKey) -> None:
    replacement = path.with_suffix(".new")
    replacement.write_text(json_format.MessageToJson(access_pb2.ApiKeys(keys=keys)))
    replacement.replace(path)
