"""Filters: `label = 'cat' and width > 500`, in the words of SQL, as an expression of Polars over the columns of rows.

Polars' own parser runs what it parses: a subquery, or a table function such as `read_csv`, opens files while it does. So a
filter is first cut into words, and each must be a column, a value, an operator, or a keyword or function of a closed list;
only what is written anew from these words reaches Polars.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import polars as pl

from clipray.errors import JobError, no_such, one_line

LONGEST, MOST_OPERATORS, DEEPEST = 20_000, 256, 20
"""Characters, operators and parentheses within each other that a filter may have."""

KEYWORDS = {
    "AND", "OR", "NOT", "IN", "LIKE", "ILIKE", "RLIKE", "BETWEEN", "IS", "NULL", "TRUE", "FALSE",
    "CASE", "WHEN", "THEN", "ELSE", "END", "AS",
}  # fmt: skip
FUNCTIONS = {
    "ABS", "CEIL", "FLOOR", "ROUND", "SQRT", "LN", "LOG10", "EXP", "POW", "MOD", "SIGN", "GREATEST", "LEAST",
    "COALESCE", "NULLIF", "IF", "CAST", "TRY_CAST", "LOWER", "UPPER", "LENGTH", "TRIM", "LTRIM", "RTRIM", "LEFT",
    "RIGHT", "SUBSTR", "STRPOS", "STARTS_WITH", "ENDS_WITH", "REGEXP_LIKE", "DATE_PART", "STRFTIME",
}  # fmt: skip
TYPES = {
    "TINYINT", "SMALLINT", "INT", "INTEGER", "BIGINT", "FLOAT", "REAL", "DOUBLE", "VARCHAR", "TEXT", "STRING",
    "BOOLEAN", "DATE", "TIMESTAMP",
}  # fmt: skip
STATEMENTS = {
    "SELECT", "FROM", "WITH", "UNION", "VALUES", "TABLE", "EXISTS",
    "INSERT", "UPDATE", "DELETE", "CREATE", "DROP", "TRUNCATE",
}  # fmt: skip
LITERALS = {"DATE", "TIMESTAMP"}  # as in DATE '2026-01-31'

WORD = r'[^\W\d]\w*|"(?:[^"]|"")+"'
TOKEN = re.compile(
    rf"""\s*(?:
    (?P<string>'(?:[^']|'')*')
    | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
    | (?P<name>(?:{WORD})(?:\.(?:{WORD}))*)
    | (?P<operator><=|>=|<>|!=|\|\||[=<>+\-*/%])
    | (?P<mark>[(),])
    )\s*""",
    re.VERBOSE,
)
PART = re.compile(WORD)


@dataclass(frozen=True)
class Filter:
    """A filter over rows.

    Attributes:
        columns: the columns that it reads.
        expression: of these, one truth value for each row.
    """

    columns: frozenset[str]
    expression: pl.Expr


@dataclass(frozen=True)
class _Token:
    group: str
    text: str

    @property
    def word(self) -> str:
        """In capitals, where it is a bare word."""
        return self.text.upper() if self.group == "name" and '"' not in self.text else ""


def parse_where(where: str, column: Callable[[str], str]) -> Filter:
    """Parse a filter. Nothing is read.

    Args:
        column: gives the column that a name stands for, and raises JobError where there is none.

    Raises:
        JobError: it is no expression of columns, values and known functions, or it is too long.
    """
    tokens = list(_tokens(where))
    _refuse_too_many(tokens)
    columns: set[str] = set()
    written = []
    for number, token in enumerate(tokens):
        before = tokens[number - 1] if number else _Token("", "")
        after = tokens[number + 1] if number + 1 < len(tokens) else _Token("", "")
        if token.group != "name" or _is_of_sql(token, before, after):
            written.append(token.text)
        else:
            name = column(_name_of(token.text))
            columns.add(name)
            written.append('"' + name.replace('"', '""') + '"')
    try:
        return Filter(frozenset(columns), pl.sql_expr(" ".join(written)))
    except pl.exceptions.PolarsError as error:
        raise JobError(f"where: {where!r} cannot be parsed: {first_line(error)}") from error


def _tokens(where: str) -> Iterator[_Token]:
    if not where.strip():
        raise JobError("where: expected an expression, such as width > 500")
    if len(where) > LONGEST:
        raise JobError(f"where: {len(where)} characters, expected at most {LONGEST}")
    place = 0
    while place < len(where):
        match = TOKEN.match(where, place)
        if match is None:
            raise JobError(
                f"where: {where[place : place + 20]!r} is not understood; values are written 'so', names \"so\""
            )
        yield _Token(str(match.lastgroup), match[str(match.lastgroup)])
        place = match.end()


def _refuse_too_many(tokens: list[_Token]) -> None:
    """Polars walks an expression recursively."""
    depth = deepest = 0
    for token in tokens:
        depth += (token.text == "(" or token.word == "CASE") - (token.text == ")" or token.word == "END")
        deepest = max(deepest, depth)
    operators = sum(token.group == "operator" or token.word in KEYWORDS | FUNCTIONS for token in tokens)
    if operators > MOST_OPERATORS:
        raise JobError(f"where: {operators} operators, expected at most {MOST_OPERATORS}; IN ('a', 'b') lists values")
    if deepest > DEEPEST:
        raise JobError(f"where: parentheses {deepest} deep, expected at most {DEEPEST}")


def _is_of_sql(token: _Token, before: _Token, after: _Token) -> bool:
    """Whether a name is a word of SQL, rather than a column. Raises JobError: it calls an unknown function."""
    word = token.word
    if after.text == "(" and word not in KEYWORDS:
        if word not in FUNCTIONS:
            raise JobError(f"where: {no_such('function', token.text.upper(), sorted(FUNCTIONS))}")
        return True
    if word in STATEMENTS:
        raise JobError(f"where: {word} is not allowed; expected an expression over columns, such as width > 500")
    return word in KEYWORDS or (before.word == "AS" and word in TYPES) or (after.group == "string" and word in LITERALS)


def _name_of(text: str) -> str:
    """The name that is written as `label`, `labels.label`, `"labels.label"` or `labels."label"`."""
    return ".".join(part.strip('"').replace('""', '"') if part[0] == '"' else part for part in PART.findall(text))


def first_line(error: BaseException) -> str:
    """What Polars says of an error, without the expression that follows."""
    return one_line(Exception(str(error).split("\n\n")[0]))
