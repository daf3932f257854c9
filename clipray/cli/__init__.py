"""The command `clipray`: one short function per verb, which calls the library."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from typing import TextIO

from clipray import __version__

# isort: off
from clipray.cli import runs, look, serve, atlas, data, cluster  # noqa: F401 - each adds its commands, in the order in which help shows them

# isort: on
from clipray.cli.app import app, err
from clipray.errors import Stopped, one_line
from clipray.runner.printing import harden_streams
from clipray.storage.environment import environment_error

__all__ = ["app", "main"]
STOPPED, UNREAD = 130, 128 + signal.SIGPIPE  # as shells report what SIGINT and SIGPIPE end
DEFECT = 70  # EX_SOFTWARE of sysexits.h


def main() -> None:
    """Entry point: every error is one line (or one line per mistake) on stderr, and its exit code."""
    harden_streams()
    _exit(_code())


def _code() -> int:
    """Run the command line. Returns the exit code."""
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:
        return UNREAD
    except KeyboardInterrupt:
        return _told("stopped", STOPPED)
    except Exception as error:
        return _code_of(error)


def _code_of(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # of the command line, from typer or the click below it
        usage = io.StringIO()
        error.show(file=usage)
        return _told(usage.getvalue().rstrip("\n"), error.exit_code)
    if isinstance(error, Stopped):
        return _told(str(error), error.exit_code)
    known = environment_error(error)
    if known is not None:
        return _told(f"clipray: {known}", known.exit_code)
    return _told(_defect(error), DEFECT)


def _told(text: str, code: int) -> int:
    with contextlib.suppress(OSError):  # there may be nobody to tell
        err.print(text)
    return code


def _defect(error: BaseException) -> str:
    """A line about an unforeseen error, whose traceback goes into a log file for the maintainers."""
    text = one_line(error, 600)
    log = _logged(error)
    where = f"see {log}" if log else f"at {_place(error)} (no log could be written)"
    return f"clipray: {type(error).__name__}: {text}: this is a defect in clipray; {where}, and please report it"


def _logged(error: BaseException) -> str | None:
    """The path of a file with the traceback, None where none can be written."""
    facts = f"clipray {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n{' '.join(sys.argv)}\n\n"
    trace = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="clipray-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(facts + trace)
    except OSError:
        return None
    return path


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"


def _exit(code: int) -> None:
    """End this process with `code`, whatever happens to buffered output and in spite of Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)
    connect = sys.modules.get("clipray.engine.connect")  # there if Ray was used
    if connect and connect.abandoned():
        os._exit(code)  # Ray's own threads would wait for it and may end us with another code
    sys.exit(code)


def _discard(stream: TextIO) -> None:
    """Discard the rest of a stream that is closed or full: otherwise Python exits with a code of its own."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
