"""Printing to a terminal: text is never markup, and its control characters are shown as escapes.

The progress of a run is a live table on a terminal, and elsewhere a plain line every few seconds.
"""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from clipray.steps.base.step import Snapshot

PLAIN_EVERY_S = 5.0
# All but line ends and tabs; the last ones turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    r"""`text` with its control characters as escapes, such as `\x1b`; line ends and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def harden_streams() -> None:
    """Print characters that a terminal's encoding lacks as escapes, such as `\\xe9`, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class PlainConsole(Console):
    """Prints strings as they are: not wrapped and not as markup. Raises BrokenPipeError when the reader is gone."""

    def print(self, *objects: Any, **options: Any) -> None:
        whole = all(isinstance(item, str) for item in objects)
        super().print(*map(_plain, objects), soft_wrap=whole, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


class PlainTable(Table):
    """A table whose cells are plain text, its title on the left. For a cell of another colour pass a `Text`, made with `shown`."""

    def __init__(self, *headers: Any, title: str | None = None, **options: Any) -> None:
        heading = None if title is None else Text(shown(title), style="table.title")
        super().__init__(*headers, title=heading, title_justify="left", **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(item: Any) -> Any:
    return Text(shown(item)) if isinstance(item, str) else item


class Display:
    """Context manager. Pass `watch` and `notice` to `run_job`."""

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._live: Live | None = None
        self._printed = 0.0

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def notice(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text)

    def watch(self, shot: Snapshot) -> None:
        """Show where the step stands."""
        if self._live:
            self._live.update(_table(shot))
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.notice(line(shot))


def line(shot: Snapshot) -> str:
    """A snapshot as one plain line."""
    parts = [f"{shot.step}: {shot.written} of {shot.total} rows on disk"]
    if shot.encoded:
        parts += [f"{shot.encoded} done in this run", f"{shot.rate:.1f} rows/s", f"{_left(shot.eta_s)} left"]
    if shot.rejected:
        parts.append(f"{shot.rejected} rejected")
    return f"{', '.join(parts)} ({shot.phase})"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _table(shot: Snapshot) -> PlainTable:
    done = shot.written + shot.rejected
    table = PlainTable(title=f"{shot.step}: {shot.phase}")
    for name in ("rows", "on disk", "rejected", "rate", "left"):
        table.add_column(name, justify="right")
    share = f" ({done / shot.total:.0%})" if shot.total else ""
    written, rate = f"{shot.written}{share}", f"{shot.rate:.1f}/s"
    table.add_row(str(shot.total), written, str(shot.rejected), rate, _left(shot.eta_s))
    for stage, figures in sorted(shot.stages.items()):
        rate, busy = f"{figures['rows_per_busy_s']:.1f}/busy s", f"{figures['busy_s']:.0f} s busy"
        table.add_row(Text(shown(stage), style="dim"), f"{int(figures['rows'])} rows", "", rate, busy)
    return table
