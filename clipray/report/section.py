"""Sections of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Headline = tuple[str, str]
"""A figure for the head of the page, and what it is."""


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        name: of its template in `pages/report`, and its anchor.
        values: what the template shows.
        tables: whose rows it shows.
    """

    name: str
    title: str
    values: dict[str, Any]
    tables: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A section that the run has no tables for, and what would add it."""

    title: str
    why: str
