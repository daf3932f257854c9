"""Progress of a run: a live table on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.live import Live
from rich.text import Text

from clipray.runner.printing import PlainConsole, PlainTable, shown
from clipray.steps.base.step import Snapshot

PLAIN_EVERY_S = 5.0


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
    table = PlainTable(title=f"{shot.step}: {shot.phase}", title_justify="left", expand=False)
    for name in ("rows", "on disk", "rejected", "rate", "left"):
        table.add_column(name, justify="right")
    share = f" ({done / shot.total:.0%})" if shot.total else ""
    table.add_row(
        str(shot.total), f"{shot.written}{share}", str(shot.rejected), f"{shot.rate:.1f}/s", _left(shot.eta_s)
    )
    for stage, figures in sorted(shot.stages.items()):
        table.add_row(
            Text(shown(stage), style="dim"),
            f"{int(figures['rows'])} rows",
            "",
            f"{figures['rows_per_busy_s']:.1f}/busy s",
            f"{figures['busy_s']:.0f} s busy",
        )
    return table
