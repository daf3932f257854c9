"""The page of a run: renders its sections in order. Values of the data are escaped and cut."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipray import __version__, tables
from clipray.job import Report
from clipray.report.clusters import clusters_section
from clipray.report.duplicates import duplicates_section
from clipray.report.label_accuracy import right_section
from clipray.report.labels import labels_section
from clipray.report.links import Links
from clipray.report.retrieval import retrieval_section
from clipray.report.run_tables import RunTables
from clipray.report.scatter import plot_section
from clipray.report.section import LeftOut, Section
from clipray.report.summary import metrics_section, ran_section, rejects_section
from clipray.report.tiles import Album

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

LONGEST = 160  # characters of any value that comes from the data
DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows, also outside of the value that holds them."""


@dataclass(frozen=True)
class Page:
    """The page as HTML. sections: by table, the sections that show its rows."""

    html: str
    sections: dict[str, list[str]]
    left_out: list[str]


def make_page(run: RunTables, title: str, settings: Report, links: Links | None = None) -> Page:
    """Read the tables of a run and lay them out.

    Args:
        links: where images and clusters link to; None: nowhere, as in a file.

    Raises:
        SchemaError: a table is not whole.
    """
    album, examples = Album(settings.thumbnail_px), settings.examples
    sections: list[Section | LeftOut] = [  # in the order of the page
        ran_section(run),
        plot_section(run, settings.points),
        clusters_section(run, album, examples),
        duplicates_section(run, album, examples),
        labels_section(run, album, examples),
        right_section(run),
        retrieval_section(run, album, examples),
        metrics_section(run),
        rejects_section(run),
    ]
    album.load(run)
    shown = [section for section in sections if isinstance(section, Section)]
    left_out = [section for section in sections if isinstance(section, LeftOut)]
    headlines = [line for section in shown for line in section.headlines]
    html = _environment(links).get_template("report/page.html").render(
        title=title, sections=shown, left_out=left_out, headlines=headlines, made=tables.now(), version=__version__,
    )  # fmt: skip
    names = {table.name: [s.title for s in shown if table.name in s.tables] for table in run.tables}
    return Page(html, names, [section.title for section in left_out])


def _environment(links: Links | None) -> Environment:
    """Jinja that escapes all values, cuts strings at LONGEST and removes their control characters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clipray.report", "pages"), autoescape=True, finalize=shown_value, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"figure": figure, "seconds": seconds, "whole": _Whole, "breaking": _breaking}
    environment.globals["links"] = links  # macros see it, too
    return environment


class _Whole(str):
    """Text that is escaped but not cut."""


def shown_value(value: Any) -> Any:
    """A value as the page shows it: other strings than markup and `_Whole` are cut and lose control characters."""
    if not isinstance(value, str) or isinstance(value, _Whole) or hasattr(value, "__html__"):
        return value
    return without_controls(value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…")


def without_controls(text: str) -> str:
    """The text without control characters, and without those that turn its direction."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text if c not in DIRECTIONS)


def _breaking(value: str) -> Markup:
    """A name that may be broken into lines after each `_`."""
    from markupsafe import Markup, escape

    return escape(shown_value(value)).replace("_", Markup("_<wbr>"))


def figure(value: float) -> str:
    """A number with four digits, or a whole number with separators."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1_000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    """A duration in hours, minutes and seconds."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
