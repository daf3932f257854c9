"""Printing to a terminal: text is never markup, and its control characters are shown as escapes."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    """A table whose cells are plain text. For a cell of another colour pass a `Text`, made with `shown`."""

    def __init__(self, *headers: Any, title: str | None = None, **options: Any) -> None:
        heading = None if title is None else Text(shown(title), style="table.title")
        super().__init__(*headers, title=heading, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(item: Any) -> Any:
    return Text(shown(item)) if isinstance(item, str) else item
