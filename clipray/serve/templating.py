"""Jinja templates of the served pages: all values are escaped, and lose control characters."""

from __future__ import annotations

import functools
import json
import math
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from clipray import __version__
from clipray.report.page import figure, seconds, shown_value, without_controls


@functools.cache
def environment() -> Environment:
    templates = Environment(
        loader=PackageLoader("clipray.serve", "templates"), autoescape=True, finalize=shown_value,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {
        "figure": figure,
        "seconds": seconds,
        "path": path_of,
        "exact": exact,
        "cell": cell,
        "whole": whole,
    }
    templates.globals |= {"version": __version__, "zip": zip}
    return templates


def path_of(name: str) -> str:
    """A name as the end of a URL's path. Its slashes stay, unless a browser would take its dots for folders."""
    dots = {".", "..", ""} & set(str(name).split("/"))
    return quote(str(name), safe="" if dots else "/")


def cell(value: Any) -> Any:
    """A value of a table as text: numbers with four digits, lists and structs as JSON, bytes as their number."""
    if value is None:
        return "–"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return figure(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def exact(value: object) -> Markup:
    """Text that is escaped but neither cut nor changed."""
    return escape(str(value))


def whole(value: object) -> Markup:
    """A message, which is not cut: it ends with what to do."""
    return escape(without_controls(str(value)))


def render(template: str, **values: Any) -> str:
    """The page as HTML."""
    return environment().get_template(template).render(**values)
