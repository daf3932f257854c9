"""JSON that lies beside a table's shards: whether it is what we write."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from clipray.storage.folder import Folder
from clipray.storage.seals import open_json, sealed_json

STARTED = "_started.json"
STARTED_FIELDS = {"settings": dict, "fingerprint": str, "attempt": int, "started_at": str, "manifest_versions": dict}


def wrong_fields(values: Any, types: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not of their type (`int`, `dict[str, Any]`, …); a whole number may be a float."""
    if not isinstance(values, Mapping):
        return list(types)
    return [name for name, value in values.items() if name in types and not _is(value, types[name])]


def _is(value: Any, expected: Any) -> bool:
    plain = typing.get_origin(expected) or expected
    return isinstance(value, (int, float) if plain is float else plain) and not isinstance(value, bool)


def read_started(folder: Folder) -> dict[str, Any] | None:
    """The note of a table that was begun; None where there is none, or none of ours; or it has changed since."""
    data = folder.read(STARTED)
    try:
        note = open_json(data)[0] if data else None
    except ValueError:
        return None
    return note if note and not wrong_fields(note, STARTED_FIELDS) else None


def write_started(folder: Folder, facts: Mapping[str, Any]) -> None:
    """Note that a table is begun, and with what."""
    folder.write(STARTED, sealed_json(facts))
