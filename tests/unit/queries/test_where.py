"""Filters: what they keep, and that nothing but an expression over the columns ever reaches Polars."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

import polars as pl
import pytest

from clipray.errors import JobError, no_such
from clipray.queries import where
from clipray.queries.where import FUNCTIONS, parse_where

ROWS = pl.DataFrame(
    {
        "images.width": [100, 600, None],
        "labels.label": ["cat", "it's a \\ dog", None],
        "images.end": [True, False, None],
        'odd "name".x': [1.5, -2.0, 0.0],
        "images.day": [datetime.date(2026, 1, 31), datetime.date(2024, 2, 29), None],
    }
)
BARE = {name.rpartition(".")[2]: name for name in ROWS.columns} | {name: name for name in ROWS.columns}


def column(name: str) -> str:
    if name not in BARE:
        raise JobError(no_such("column", name, list(BARE)))
    return BARE[name]


def kept(text: str) -> list[int]:
    rows = ROWS.with_columns(parse_where(text, column).expression.alias("kept"))
    return [n for n, truth in enumerate(rows["kept"].to_list()) if truth]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("width > 500", [1]),
        ("label = 'cat' and width < 500 or FALSE", [0]),
        ("images.width between 100 and 600", [0, 1]),
        ('"images.width" = 600', [1]),
        ('images."width" IN (1, 600)', [1]),
        ("label = 'it''s a \\ dog'", [1]),
        ("label LIKE 'c%' OR label ILIKE '%DOG'", [0, 1]),
        ("NOT (label IS NULL) and -width - -1 < 0", [0, 1]),
        ('"end" and images."end"', [0]),
        ("images.end = true", [0]),
        ('"odd ""name"".x" > 1e0', [0]),
        ("CASE WHEN width > 500 THEN 'a' ELSE 'b' END = 'b'", [0, 2]),
        ("CAST(width AS VARCHAR) = '100'", [0]),
        ("day > DATE '2025-12-31'", [0]),
        ("DATE_PART('year', day) = 2024", [1]),
        ("starts_with(lower(label), 'CAT') or length(label) > 10", [1]),
        ("'/*' <> label --1 and 2 = 2".replace("--1 and", "and"), [0, 1]),
        ("label <> 'x''; DROP TABLE y; --'", [0, 1]),
        ("label = '\\' or label = ' or width in (SELECT 1 FROM read_csv(''/etc/passwd'')) or label = '", []),
        ("label = 'SELECT * FROM read_csv(''/etc/passwd'')'", []),
    ],
)
def test_what_a_filter_keeps(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


def test_the_columns_that_it_reads() -> None:
    assert parse_where("label = 'width' and images.width > 1 and width < 9", column).columns == {
        "labels.label",
        "images.width",
    }


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_polars_knows_every_function(function: str) -> None:
    """An unknown one, or one of other arguments, is told by what Polars says; these are known."""
    arguments = {
        "CAST": "width AS INT",
        "TRY_CAST": "width AS INT",
        "DATE_PART": "'year', day",
        "STRFTIME": "day, '%Y'",
    }
    arguments |= dict.fromkeys(("STRPOS", "STARTS_WITH", "ENDS_WITH", "REGEXP_LIKE"), "label, 'c'")
    arguments |= dict.fromkeys(("LOWER", "UPPER", "LENGTH", "TRIM", "LTRIM", "RTRIM"), "label")
    arguments |= {"SUBSTR": "label, 1, 2", "LEFT": "label, 1", "RIGHT": "label, 1", "IF": "TRUE, width, 1"}
    arguments |= dict.fromkeys(("COALESCE", "NULLIF", "GREATEST", "LEAST", "POW", "MOD"), "width, 2")
    assert len(kept(f"{function}({arguments.get(function, 'width')}) IS NOT NULL")) >= 1


HOSTILE = [
    "width IN (SELECT width FROM read_parquet('{file}'))",
    "width = (SELECT MAX(width) FROM read_csv('{file}'))",
    "EXISTS (SELECT 1 FROM read_ndjson('{file}'))",
    "(SELECT 1)",
    "read_parquet('{file}')",
    "width IN (TABLE x)",
    "width > 1; DROP TABLE x",
    "width > 1 UNION SELECT 1",
    "WITH x AS (SELECT 1) SELECT * FROM x",
    "label = E'\\' or width in (SELECT 1 FROM read_csv(' || ') or label = '",
    "width > 1 -- ' \n IN (SELECT 1 FROM read_csv('{file}'))",
    "width > 1 /* */",
    '"width" IN "(SELECT 1)"',
    '"images.width"" IN (SELECT 1 FROM read_csv(\'{file}\')) OR ""images.width" = 1',
    "label = $$cat$$",
    "label = q'[cat]'",
    "label = `cat`",
    "label = 'cat",
    '"width',
    "width > 1)",
    "((width > 1)",
    "*",
    "width IN (*)",
    "COUNT(*) > 1",
    "width > 1, width > 2",
    "width OVER (PARTITION BY label) > 1",
    "width::VARCHAR = '1'",
    "repeat(label, 1000000000) = 'x'",
    "env('HOME') = 'x'",
    "label = 'a' COLLATE \"C\"",
    "width = @x",
    "width = ?",
    "width = {{file}}",
    "\0",
    "\ud800",
    "width > 1 \u2028 SELECT",
    "ＳＥＬＥＣＴ 1",
    "",
    "   ",
    "(" * 21 + "width > 1" + ")" * 21,
    "(" * 5_000,
    "NOT " * 5_000 + "TRUE",
    "- " * 5_000 + "width > 1",
    " OR ".join(["width > 1"] * 5_000),
    "CASE WHEN TRUE THEN " * 100 + "TRUE" + " END" * 100,
    "width IN (" + ", ".join("1" * 30 for _ in range(2_000)) + ")",
    "label = '" + "x" * 20_000 + "'",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_ones_are_one_line_and_read_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reached = tmp_path / "x.csv", []
    file.write_text("width\n600\n")
    parse = pl.sql_expr

    def watched(sql: str) -> pl.Expr:
        reached.append(sql)
        return parse(sql)

    monkeypatch.setattr(where.pl, "sql_expr", watched)
    with pytest.raises(JobError, match=r"^(where: |no column )") as caught:
        parse_where(text.replace("{file}", str(file)), column)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000
    outside = [" ".join(sql.split("'")[::2]) for sql in reached]  # without values
    assert not any(word in sql.upper() for sql in outside for word in ("SELECT", "READ_", "TABLE", "--", "/*"))


def test_the_longest_filters_are_answered_in_a_thread() -> None:
    """Whose stack is smaller than that of the first one."""
    deep = "(" * 20 + "width > 500" + ")" * 20
    wide = " OR ".join(["width > 500"] * (where.MOST_OPERATORS // 2))
    signs = "- " * (where.MOST_OPERATORS // 8 + 1) + "width < 500"
    for text in (deep, wide, signs):
        answers: list[list[int]] = []
        thread = threading.Thread(target=lambda t=text, a=answers: a.append(kept(t)))
        thread.start()
        thread.join()
        assert 1 in answers[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lable = 'cat'", "no column 'lable', found: .*; did you mean 'label'?"),
        ("lenght(label) > 1", "no function 'LENGHT', found: .*; did you mean 'LENGTH'?"),
        ("SELECT width", "SELECT is not allowed; expected an expression over columns"),
        ("label == 'cat'", "cannot be parsed"),
        ("label = \u201ccat\u201d", "is not understood; values are written 'so'"),
        ("width >", "cannot be parsed"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_where(text, column)
