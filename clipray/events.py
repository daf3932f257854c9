"""`events.jsonl` in the run's folder: what happened, one JSON object a line, for people and for `clipray status`."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from typing import Any

from clipray.storage import Folder

NAME = "events.jsonl"
REMOTE_PUT_S = 10.0


class Events:
    """Appends to the log. On storage that cannot append, the whole log is put again, at most every few seconds."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._remote: list[str] = []
        self._put_at = 0.0
        if not folder.local:
            self._remote = (folder.read(NAME) or b"").decode().splitlines()

    def write(self, event: str, **fields: Any) -> None:
        """Log one event; `time` (UTC, ISO 8601) is added."""
        line = json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields},
            ensure_ascii=False,
            default=str,
        )
        if self._folder.local:
            os.makedirs(self._folder.path(""), exist_ok=True)
            with open(self._folder.path(NAME), "ab+") as file:
                if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    file.write(b"\n")  # a kill tore the last line: ours begins on one of its own
                file.write(f"{line}\n".encode())
            return
        self._remote.append(line)
        if event != "progress" or time.monotonic() - self._put_at > REMOTE_PUT_S:
            self._folder.write(NAME, ("\n".join(self._remote) + "\n").encode())
            self._put_at = time.monotonic()


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """All whole lines of the log; a line torn by a kill is skipped."""
    events = []
    for line in (folder.read(NAME) or b"").decode("utf-8", "replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
