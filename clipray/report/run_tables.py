"""The tables of a run that a page shows, found by type and read a shard at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from clipray import tables
from clipray.storage.folder import Folder, absolute, split
from clipray.tables.scan import scan_table

STRINGS = ("string", "large_string")
LABELS = (*STRINGS, "int8", "int16", "int32", "int64")  # types of a column of labels


@dataclass(frozen=True)
class RunTable:
    """A finished table."""

    name: str
    folder: Folder
    record: tables.Record

    @property
    def type(self) -> str:
        """The table type, such as `images`."""
        return self.record.table

    @property
    def ids(self) -> tuple[str, ...]:
        """Columns that name a row, the last of which is its own name."""
        fixed = {column["name"] for column in tables.table_schema(self.type)["columns"]}
        return tuple(name for name, dtype in self.record.columns.items() if name not in fixed and dtype in STRINGS)

    def scan(self, *columns: str) -> pl.LazyFrame:
        """These columns, read a shard at a time."""
        columns = tuple(dict.fromkeys(columns))
        return scan_table(self.folder.url, columns).select(columns)

    def shards(self, *columns: str) -> Iterator[pl.DataFrame]:
        """These columns of its shards, one after the other."""
        for shard in tables.iter_table(self.folder.url, columns := tuple(dict.fromkeys(columns))):
            yield pl.DataFrame(shard.select(columns))

    def where(self, column: str, values: Collection[str], *columns: str) -> list[dict[str, Any]]:
        """These columns of the rows with one of these values."""
        if not values:
            return []
        rows = self.scan(column, *columns).filter(pl.col(column).cast(pl.String).is_in(sorted(values)))
        return rows.select(columns).collect(engine="streaming").to_dicts()


@dataclass(frozen=True)
class RunTables:
    """The tables that a page shows.

    Attributes:
        tables: finished ones, in the order in which they are shown.
        absent: names of those that should be there and are not finished.
        label: the column with known labels, in the table of images.
    """

    output: Folder
    tables: tuple[RunTable, ...]
    absent: tuple[str, ...] = ()
    label: str = "label"

    def of_type(self, table_type: str) -> list[RunTable]:
        return [table for table in self.tables if table.type == table_type]

    def companion(self, table: RunTable, suffix: str) -> RunTable | None:
        """The companion table that the step of a table writes, such as `clusters_centroids`."""
        name = f"{table.name}_{suffix}"
        return open_table(name, _home(table).sub(name))

    def known(self, table_type: str) -> list[RunTable]:
        """Tables of this type, such as `images`: of this run, or of another that its vectors come from."""
        by_url = {table.folder.url: table for table in (*self.tables, *self._others) if table.type == table_type}
        return list(by_url.values())

    def has_label(self, table: RunTable) -> bool:
        """Whether a table of images has the column with known labels."""
        dtype = table.record.columns.get(self.label, "")
        return dtype in LABELS or dtype.startswith("dictionary<values=string")

    @cached_property
    def _others(self) -> list[RunTable]:
        """Tables that those of the run were made of, directly or not, wherever they lie."""
        others: dict[str, RunTable] = {}
        todo = [(table, self.output) for table in self.tables]
        while todo:
            table, home = todo.pop()
            for name in _inputs(table.record):
                folder = Folder(absolute(name)) if "/" in name else home.sub(name)
                if folder.url not in others and (other := open_table(name, folder)) is not None:
                    others[folder.url] = other
                    todo.append((other, _home(other)))
        return list(others.values())


def open_table(name: str, folder: Folder) -> RunTable | None:
    """The table, or None where it is not finished."""
    record = tables.read_record(folder)
    return RunTable(name, folder, record) if record is not None and record.columns else None


def open_run(output: Folder, names: Sequence[str], label: str) -> RunTables:
    """The tables of these names that are finished."""
    opened = {name: open_table(name, output.sub(name)) for name in names}
    absent = tuple(name for name, table in opened.items() if table is None)
    return RunTables(output, tuple(table for table in opened.values() if table is not None), absent, label)


def finished_tables(output: Folder) -> list[str]:
    """Names of all finished tables of a run but its pages and `metrics`, in the order in which they were finished."""
    opened = [table for name in output.folders() if (table := open_table(name, output.sub(name))) is not None]
    opened.sort(key=lambda table: (table.record.finished_at, table.name))
    return [table.name for table in opened if table.type not in ("report", "metrics")]


def _home(table: RunTable) -> Folder:
    """The folder of the run that a table is of."""
    return Folder(split(table.folder.url)[0])


def _inputs(record: tables.Record) -> Iterator[str]:
    """The tables of ours that a table was made of, as its job calls them."""
    made_of = record.settings.get("queries" if record.table == "neighbours" else "input")
    if isinstance(made_of, dict) and "table" in made_of and isinstance(record.inputs.get("input"), str):
        yield record.inputs["input"].rpartition(".")[0]
    index = record.provenance.get("index")
    if isinstance(index, dict) and isinstance(index.get("name"), str):
        yield index["name"]
