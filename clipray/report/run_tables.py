"""The tables of a run that a page is made of, found by their kind, and read a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.storage.folder import Folder, absolute, split

STRINGS = ("string", "large_string")
LABELS = (*STRINGS, "int8", "int16", "int32", "int64")  # types of a column of labels


@dataclass(frozen=True)
class RunTable:
    """A finished table."""

    name: str
    folder: Folder
    record: tables.Record

    @property
    def kind(self) -> str:
        return self.record.table

    @property
    def ids(self) -> tuple[str, ...]:
        """Columns that name a row, the last of which is its own name."""
        fixed = {column["name"] for column in tables.table_schema(self.kind)["columns"]}
        return tuple(name for name, kind in self.record.columns.items() if name not in fixed and kind in STRINGS)

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Its shards, one after the other."""
        return tables.iter_table(self.folder.url, list(dict.fromkeys(columns)))

    def where(self, column: str, wanted: set[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows with one of these values, as plain values of `columns`."""
        if not wanted:
            return
        values = pa.array(sorted(wanted), pa.string())
        for part in self.parts([column, *columns]):
            yield from part.filter(pc.is_in(part[column].cast(pa.string()), values)).select(list(columns)).to_pylist()


@dataclass(frozen=True)
class RunTables:
    """What a page is made of.

    Attributes:
        tables: finished ones, in the order in which they are shown.
        absent: names of those that should be there and are not finished.
        label: the column with known labels, in the table of pictures.
    """

    output: Folder
    tables: tuple[RunTable, ...]
    absent: tuple[str, ...] = ()
    label: str = "label"

    def of_kind(self, kind: str) -> list[RunTable]:
        return [table for table in self.tables if table.kind == kind]

    def beside(self, table: RunTable, suffix: str) -> RunTable | None:
        """The table that a step writes beside its own: `clusters_centroids`."""
        name = f"{table.name}_{suffix}"
        return open_table(name, _home(table).sub(name))

    @cached_property
    def pictures(self) -> list[RunTable]:
        """Tables that know where pictures lie: of this run, or of another that its vectors come from."""
        return self._known("images")

    @cached_property
    def regions(self) -> list[RunTable]:
        return self._known("regions")

    @cached_property
    def texts(self) -> list[RunTable]:
        return self._known("texts")

    def has_label(self, table: RunTable) -> bool:
        """Whether a table of pictures has the column with known labels."""
        kind = table.record.columns.get(self.label, "")
        return kind in LABELS or kind.startswith("dictionary<values=string")

    def _known(self, kind: str) -> list[RunTable]:
        found = {table.folder.url: table for table in (*self.tables, *self._others) if table.kind == kind}
        return list(found.values())

    @cached_property
    def _others(self) -> list[RunTable]:
        """Tables that those of the run were made of, and those that they were made of, wherever they lie."""
        found: dict[str, RunTable] = {}
        todo = [(table, self.output) for table in self.tables]
        while todo:
            table, home = todo.pop()
            for name in _inputs(table.record):
                folder = Folder(absolute(name)) if "/" in name else home.sub(name)
                if folder.url not in found and (other := open_table(name, folder)) is not None:
                    found[folder.url] = other
                    todo.append((other, _home(other)))
        return list(found.values())


def open_table(name: str, folder: Folder) -> RunTable | None:
    """The table, or None where it is not finished."""
    record = tables.read_record(folder)
    return RunTable(name, folder, record) if record is not None and record.columns else None


def open_run(output: Folder, names: Sequence[str], label: str) -> RunTables:
    """The tables of these names that are finished."""
    found = {name: open_table(name, output.sub(name)) for name in names}
    absent = tuple(name for name, table in found.items() if table is None)
    return RunTables(output, tuple(table for table in found.values() if table is not None), absent, label)


def finished_tables(output: Folder) -> list[str]:
    """Names of all finished tables of a run but its pages and `metrics`, in the order in which they were finished."""
    found = [table for name in output.folders() if (table := open_table(name, output.sub(name))) is not None]
    found.sort(key=lambda table: (table.record.finished_at, table.name))
    return [table.name for table in found if table.kind not in ("report", "metrics")]


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
