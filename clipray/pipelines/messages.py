"""Small messages from a worker to whoever watches the run."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Takes `{stage, rows, seconds}`, `{worker: facts}` or `{fatal: text}`; never waits."""


@contextlib.contextmanager
def fatal(report: Report) -> Iterator[None]:
    """An error that is no row's fault ends the run: Ray Data would only drop the block and go on."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        report(
            {
                "fatal": f"{type(error).__name__}: {' '.join(str(error).split())[:600]} ({os.path.basename(place.filename)}:{place.lineno})"
            }
        )
        raise


def worker_facts(facts: Mapping[str, object], threads: int) -> dict[str, Any]:
    """The message that describes a worker's encoder."""
    return {"worker": {**facts, "pid": os.getpid(), "host": socket.gethostname(), "threads": threads}}
