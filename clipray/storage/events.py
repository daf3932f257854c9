"""`events.jsonl` in the run's folder: what happened, one JSON object a line, for people and for `clipray status`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from clipray.storage.environment import environment_error
from clipray.storage.folder import Folder

NAME = "events.jsonl"
REMOTE_PUT_S = 10.0


class Events:
    """Appends to the log. On storage that cannot append, the whole log is written again, at most every few seconds.

    The log never stops the work: what cannot be written is left out, and `say` gets one message.
    """

    def __init__(self, folder: Folder, say: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._say = folder, say
        self._remote: list[str] = []
        self._put_at = 0.0
        self._failed = False
        if not folder.local:
            self._remote = (folder.read(NAME) or b"").decode("utf-8", "replace").splitlines()

    def begin(self, event: str, **fields: Any) -> None:
        """Log the first event. Errors of writing are raised: without a writable log there is no run."""
        self._append(event, fields)

    def write(self, event: str, **fields: Any) -> None:
        """Log one event; `time` (UTC, ISO 8601) is added. Errors of the machine or the storage are not raised."""
        try:
            self._append(event, fields)
        except Exception as error:
            known = environment_error(error)
            if known is None:
                raise
            if not self._failed:
                self._say(f"events cannot be written: {known}")
            self._failed = True

    def _append(self, event: str, fields: dict[str, Any]) -> None:
        line = json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields},
            ensure_ascii=False,
            default=str,
        ).encode("utf-8", "backslashreplace")
        if self._folder.local:
            os.makedirs(self._folder.path(""), exist_ok=True)
            with open(self._folder.path(NAME), "ab+") as file:
                if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    line = b"\n" + line  # a kill tore the last line: ours begins on one of its own
                file.write(line + b"\n")
            return
        self._remote.append(line.decode())
        if event != "progress" or time.monotonic() - self._put_at > REMOTE_PUT_S:
            self._folder.write(NAME, ("\n".join(self._remote) + "\n").encode())
            self._put_at = time.monotonic()


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """All events of the log; lines that a kill cut off, and lines that are not events, are skipped."""
    events = []
    for line in (folder.read(NAME) or b"").decode("utf-8", "replace").split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("time"), str):
            events.append(event)
    return events
