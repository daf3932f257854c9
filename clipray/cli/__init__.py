"""The command `clipray`: one short function per verb; the work is in the library."""

from __future__ import annotations

import os
import sys

# isort: off
from clipray.cli import runs, cluster, data, look  # noqa: F401 - each adds its verbs, in the order in which help shows them

# isort: on
from clipray.cli.app import app, err
from clipray.errors import ClipRayError, Stopped

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: every expected error is one line (or one line per mistake) on stderr, and its exit code."""
    try:
        app(standalone_mode=True)
    except Stopped as error:
        err.print(str(error), markup=False, soft_wrap=True)
        _exit(error.exit_code)
    except ClipRayError as error:
        err.print(f"clipray: {error}", markup=False, soft_wrap=True)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("stopped", markup=False)
        _exit(130)


def _exit(code: int) -> None:
    connect = sys.modules.get("clipray.engine.connect")  # there if Ray was used
    if connect and connect.abandoned():
        sys.stdout.flush()
        os._exit(code)  # Ray's own threads would wait for it and may end us with another code
    sys.exit(code)
