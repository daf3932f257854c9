"""Conditions on columns in the words of SQL, as links and forms add them to a query's `where`."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Any

from clipray.queries.where import FUNCTIONS, KEYWORDS, LITERALS, STATEMENTS

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?")
RESERVED = KEYWORDS | FUNCTIONS | STATEMENTS | LITERALS
AND = re.compile(r"\s+and\s+", re.IGNORECASE)
OR = re.compile(r"\bor\b|\bcase\b|\bbetween\b", re.IGNORECASE)


def column_name(name: str) -> str:
    """A column, in quotes where it needs them."""
    words = {word.upper() for word in name.split(".")}
    return name if PLAIN.fullmatch(name) and not words & RESERVED else '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """A value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return f"TIMESTAMP '{value.isoformat(sep=' ')}'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def equals(name: str, value: Any) -> str:
    return f"{column_name(name)} = {literal(value)}"


def between(name: str, low: str, high: str) -> list[str]:
    """Conditions that a column is not outside of `low` to `high`, either of which may be empty."""
    ends = ((">=", low.strip()), ("<=", high.strip()))
    return [f"{column_name(name)} {sign} {_end(end)}" for sign, end in ends if end]


def contains(name: str, text: str) -> str:
    """The condition that a column of strings has `text` in it, in any case."""
    return f"strpos(lower({column_name(name)}), {literal(text.lower())}) > 0"


def toggled(where: str, condition: str) -> str:
    """The condition added to others, or taken away where it is one of them."""
    conditions = _conditions(where)
    if condition in conditions:
        return " and ".join(each for each in conditions if each != condition)
    return " and ".join([*conditions, condition])


def has(where: str, condition: str) -> bool:
    return condition in _conditions(where)


def _conditions(where: str) -> list[str]:
    """Those that must all be true. A whole that `and` may not divide stays one, in parentheses."""
    if not where.strip():
        return []
    if OR.search(where) or AND.search(_strings(where)):
        is_closed = where.startswith("(") and where.endswith(")") and "(" not in where[1:-1] and ")" not in where[1:-1]
        return [where if is_closed else f"({where})"]
    return AND.split(where)


def _strings(where: str) -> str:
    return " ".join(re.findall(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", where))


def _end(text: str) -> str:
    """A number as it is, a time in quotes."""
    try:
        float(text)
    except ValueError:
        return f"{'TIMESTAMP' if len(text) > len('2026-01-31') else 'DATE'} {literal(text)}"
    return text
