"""A model's tokenizer, template and configuration files, as they travel between services."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256


def checksum(files: Mapping[str, bytes]) -> str:
    """The `files_checksum` of a model card, in hex.

    SHA-256 over, for each file in the order of names: name, NUL, decimal length, NUL, bytes. The
    length makes it unambiguous where a file ends.
    """
    digest = sha256()
    for name in sorted(files):
        data = files[name]
        digest.update(b"%b\0%d\0" % (name.encode(), len(data)))
        digest.update(data)
    return digest.hexdigest()
