"""Columns of a run's tables, aligned with the rows of an index: to filter by, to count and to show.

A column is read when it is first asked for. Strings of few values are held as numbers of these values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.errors import JobError
from clipray.inputs.key_index import ABSENT
from clipray.queries.facets import Facet, facet_of
from clipray.queries.row_numbers import RowNumbers
from clipray.queries.run_columns import FILLED, Column, RunColumns
from clipray.queries.where import first_line
from clipray.storage.folder import Folder

HELD_BYTES = 256 * 2**20  # of columns
MASKS = 8  # held, of a byte a row
MOST_VALUES = 65_535  # of a column that is held as numbers of its values


class RowColumns:
    """Columns of the rows of an index, of the run at `output`. Thread-safe.

    Columns are called by `schema`'s names, or by `table.column`.

    Args:
        ids: identity columns (n rows) in the order of the rows' numbers.
    """

    def __init__(self, output: Folder, ids: pa.Table) -> None:
        self._output, self._ids = output, ids
        self._loading, self._holding = threading.RLock(), threading.Lock()
        self._columns: RunColumns | None = None
        self._numbers: dict[str, RowNumbers] = {}
        self._rows_of: dict[tuple[str, str, str], np.ndarray] = {}
        self._recurring: dict[str, bool] = {}
        self._held: OrderedDict[str, pl.Series] = OrderedDict()
        self._masks: OrderedDict[str, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def columns(self) -> RunColumns:
        """Which columns there are, with the tables that they are of."""
        if self._columns is None:
            with self._loading:
                self._columns = self._columns or RunColumns(self._output, self._ids.column_names)
        return self._columns

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The columns that can be filtered by, by name: ids, numbers, strings, truth values and times."""
        return {name: self.columns.all[full].dtype for name, full in self.columns.names.items()}

    def numbers_by(self, key: str) -> RowNumbers:
        """The rows by one of their identity columns."""
        if key not in self._numbers:
            with self._loading:
                self._numbers[key] = self._numbers.get(key) or RowNumbers.of(self._ids[key])
        return self._numbers[key]

    def mask(self, where: str) -> np.ndarray:
        """(n,) bool, read-only: the rows for which a filter is true. The last few are held.

        Raises:
            JobError: it is no expression over the columns, or not one that is true or false for each row.
        """
        with self._holding:
            if where in self._masks:
                self._masks.move_to_end(where)
                return self._masks[where]
        mask = self._evaluated(where)
        mask.setflags(write=False)
        with self._holding:
            self._masks[where] = mask
            while len(self._masks) > MASKS:
                self._masks.popitem(last=False)
        return mask

    def facets(
        self, columns: Sequence[str] | None = None, mask: np.ndarray | None = None, top: int = 20
    ) -> dict[str, Facet]:
        """What columns hold, by name.

        Args:
            columns: None: all but those of strings that hardly ever recur, such as ids.
            mask: (n,) bool, the rows that are counted; None: all. top: the values that are counted, of strings.

        Raises:
            JobError: there is no such column.
        """
        facets = {}
        rows = None if mask is None else pl.Series(mask)
        for name in self.schema if columns is None else columns:
            column = self.columns.resolve(name)
            if columns is None and not self._recurs(column):
                continue
            series = self._series(column)
            if columns is None and series.dtype == pl.String:  # else its values would be numbered
                continue
            facets[name] = facet_of(series if rows is None else series.filter(rows), top)
        return facets

    def rows(self, numbers: np.ndarray | Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Values of some rows by name, in the order of `numbers` (m,). columns: None for all. Raises JobError as `facets`."""
        return self._taken(np.asarray(numbers), columns).to_dicts()

    def frame(
        self, columns: Sequence[str] | None = None, *, mask: np.ndarray | None = None, sort: str | None = None,
        descending: bool = False, offset: int = 0, limit: int | None = None,
    ) -> pl.DataFrame:  # fmt: skip
        """A page of rows with these columns, or all. Raises JobError as `facets`.

        Args:
            mask: (n,) bool, the rows that are shown; None: all.
            sort: the column by which they are sorted, nulls last; None: as the index has them.
        """
        numbers = np.arange(len(self)) if mask is None else np.flatnonzero(mask)
        if sort is not None:
            order = _plain(self._series(self.columns.resolve(sort)).gather(numbers))
            numbers = numbers[order.arg_sort(descending=descending, nulls_last=True).to_numpy()]
        return self._taken(numbers[offset:][:limit], columns)

    def values(self, column: Column, numbers: Sequence[int]) -> list[Any]:
        """Of one of `columns`, also of one of lists: its values in some rows."""
        return self._series(column).gather(list(numbers)).to_list()

    def _taken(self, numbers: np.ndarray, columns: Sequence[str] | None) -> pl.DataFrame:
        names = list(self.schema) if columns is None else list(dict.fromkeys(columns))
        taken = [self._series(self.columns.resolve(name)).gather(numbers) for name in names]
        return pl.DataFrame([_plain(series).alias(name) for name, series in zip(names, taken, strict=True)])

    def _evaluated(self, where: str) -> np.ndarray:
        chosen = self.columns.filter(where)
        frame = pl.DataFrame({name: _plain(self._series(self.columns.all[name])) for name in sorted(chosen.columns)})
        try:
            kept = frame.select(kept=chosen.expression.fill_null(False))["kept"].to_numpy()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise JobError(f"where: {where!r}: {first_line(error)}") from error
        return np.repeat(kept, len(self)) if len(kept) != len(self) else np.array(kept)

    def _series(self, column: Column) -> pl.Series:
        """The column (n,). While one is read, others are there."""
        series = self._from_held(column)
        if series is None:
            with self._loading:
                series = self._from_held(column)
                if series is None:
                    series = self._loaded(column)
                    pa.default_memory_pool().release_unused()
                    self._hold(column, series)
        return series

    def _from_held(self, column: Column) -> pl.Series | None:
        with self._holding:
            if column.name in self._held:
                self._held.move_to_end(column.name)
            return self._held.get(column.name)

    def _hold(self, column: Column, series: pl.Series) -> None:
        with self._holding:
            self._held[column.name] = series
            while len(self._held) > 1 and sum(s.estimated_size() for s in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)

    def _recurs(self, column: Column) -> bool:
        """Whether values of a column recur, as its table's first shard tells; always of what are no strings."""
        if column.dtype != pl.String:
            return True
        if column.name not in self._recurring:
            url = self._output.sub(column.table).url
            shards = tables.iter_table(url, [column.source]) if column.table and not column.is_joined else iter(())
            first = next((pl.DataFrame(shard.select([column.source])) for shard in shards), None)
            self._recurring[column.name] = first is not None and _numbered(first.to_series()).dtype != pl.String
        return self._recurring[column.name]

    def _loaded(self, column: Column) -> pl.Series:
        if not column.table:
            return pl.Series(column.name, self._ids[column.name])
        if column.is_joined:
            return self._joined(column)
        url = self._output.sub(column.table).url
        shards = [pl.DataFrame(shard.select([column.source])) for shard in tables.iter_table(url, [column.source])]
        if not shards:
            return pl.Series(column.name, [None] * len(self), column.dtype)
        rows = pl.Series(self._table_rows(column))
        values = pl.concat(shards)[column.source].gather(rows.set(rows == ABSENT, None))
        if (column.table_type, column.source) in FILLED:
            values = values.fill_null(FILLED[column.table_type, column.source])
        return _numbered(values)

    def _joined(self, column: Column) -> pl.Series:
        """The strings of all rows of the column's table that are of a row, a line each."""
        numbers = self.numbers_by(column.key)
        frames = [pl.DataFrame(schema={"key": pl.Int64, "value": pl.String})]
        for shard in tables.iter_table(self._output.sub(column.table).url, [column.key, column.source]):
            keys = numbers.keys.positions(shard[column.key])
            frames.append(pl.DataFrame({"key": keys, "value": pl.Series(shard[column.source])}).filter(keys != ABSENT))
        lines = pl.concat(frames).group_by("key", maintain_order=True).agg(pl.col("value").str.join("\n"))
        row_of_key = np.full(len(numbers.keys), ABSENT, np.int32)
        row_of_key[lines["key"].to_numpy()] = np.arange(len(lines))
        rows = pl.Series(row_of_key[numbers.key_of_row])
        return lines["value"].gather(rows.set(rows == ABSENT, None))

    def _table_rows(self, column: Column) -> np.ndarray:
        """(n,) int32: the row in the column's table of each row, or ABSENT."""
        place = (column.table, column.key, column.style)
        if place not in self._rows_of:
            numbers = self.numbers_by(column.key)
            row_of_key = np.full(len(numbers.keys), ABSENT, np.int32)
            start = 0
            wanted = [column.key, "style"] if column.style else [column.key]
            for shard in tables.iter_table(self._output.sub(column.table).url, wanted):
                places = numbers.keys.positions(shard[column.key])
                if column.style:
                    places[~pc.equal(shard["style"], column.style).to_numpy()] = ABSENT
                known = np.flatnonzero(places != ABSENT)
                row_of_key[places[known]] = start + known
                start += len(shard)
            self._rows_of[place] = row_of_key[numbers.key_of_row]
        return self._rows_of[place]


def _numbered(series: pl.Series) -> pl.Series:
    """A column of strings that recur as numbers of its values; another one as it is."""
    strings = series.cast(pl.String) if series.dtype == pl.Categorical else series
    if strings.dtype != pl.String:
        return series
    values = strings.drop_nulls().unique()
    if len(values) > MOST_VALUES or 2 * len(values) > len(strings):
        return strings
    return strings.cast(pl.Enum(values.sort()))


def _plain(series: pl.Series) -> pl.Series:
    return series.cast(pl.String) if series.dtype == pl.Enum else series
