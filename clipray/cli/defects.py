"""Unforeseen errors: one line, and a log file for the maintainers."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from clipray import __version__

CODE = 70  # EX_SOFTWARE of sysexits.h


def told_defect(error: BaseException) -> tuple[str, int]:
    """A line about the error, and the exit code."""
    text = " ".join(str(error).split())[:600]
    log = _logged(error)
    where = f"see {log}" if log else f"at {_place(error)} (no log could be written)"
    return f"clipray: {type(error).__name__}: {text}: this is a defect in clipray; {where}, and please report it", CODE


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
