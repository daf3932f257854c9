"""A lock that allows one run at a time for each output, and a clean stop on SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from clipray.errors import RunError
from clipray.storage.folder import Folder

LOCK = ".lock"


@contextlib.contextmanager
def only_run(output: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """Allow one run at a time for an output on a local disk. The lock ends with the process, however that ends."""
    if not output.local:
        yield
        return
    import fcntl

    Path(output.path("")).mkdir(parents=True, exist_ok=True)
    with open(output.path(LOCK), "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{output.url}: another run is working there (process {file.read().strip() or '?'}); wait for it or stop it"
            ) from None
        except OSError as error:  # a file system without locks
            say(f"{output.url}: cannot be locked ({error.strerror}); make sure that no other run writes there")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
