"""Which columns of a run's tables describe the rows of an index, and by which names people ask for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from clipray import tables
from clipray.errors import JobError, SchemaError, no_such
from clipray.queries.where import Filter, first_line, parse_where
from clipray.storage.folder import Folder
from clipray.tables.scan import scan_table

ROW_TABLES = ("images", "regions", "texts", "clouds", "region_pictures", "labels", "clusters", "duplicates", "map")
"""Types of tables that have at most one row for a row of an index: of each style, where a table has several."""
ENCODED = ("images", "texts", "clouds")  # whose rows are those of a manifest
KEYS = {
    "images": "image_id", "region_pictures": "image_id", "regions": "region_id", "texts": "text_id", "clouds": "cloud_id",
}  # fmt: skip
"""The column that names a row, of tables that may have kept others that are called like an id."""
ELSEWHERE = {("duplicates", "cluster_id")}  # `clusters` has it for all rows
FILLED = {("duplicates", "kept"): True}
"""What a column holds for rows that its table does not have."""


@dataclass(frozen=True)
class Column:
    """A column that describes rows.

    Attributes:
        name: `images.width`; `labels.label_photo` of another style than the first one; an id has no table: `image_id`.
        bare: `width`, by which it is called too where no other table has such a column.
        table: the name of its table; "" of an id. table_type: of `ROW_TABLES`.
        source: its name in the table. key: the id that rows are joined by. style: of the rows, "" where there are none.
        is_kept: whether the job kept it of its manifest.
        is_joined: whether a row has several values, strings that are joined by line ends: the texts of an image.
    """

    name: str
    bare: str
    dtype: pl.DataType
    table: str = ""
    table_type: str = ""
    source: str = ""
    key: str = ""
    style: str = ""
    is_kept: bool = False
    is_joined: bool = False

    @property
    def is_scalar(self) -> bool:
        """Whether it can be filtered by."""
        return not self.dtype.is_nested() and self.dtype not in (pl.Binary, pl.Object)


class RunColumns:
    """The columns of the run at `output` that describe rows with these ids.

    Attributes:
        all: by name; ids first. names: by which to show those that can be filtered by, to `Column.name`: bare ones, where
            they are unique. A column that the job kept of its manifest has its bare name in any case.
    """

    def __init__(self, output: Folder, ids: Sequence[str]) -> None:
        columns = [Column(name, name, pl.String()) for name in ids]
        self._unreadable: dict[str, str] = {}
        for name, record in _tables(output, ids):
            try:
                columns += _columns(output, name, record, ids)
            except SchemaError as error:  # which is nothing to queries that do not need it
                self._unreadable[name] = str(error)
        self.all = {column.name: column for column in columns}
        self._by_bare = {bare: [c.name for c in columns if c.bare == bare] for bare in {c.bare for c in columns}}
        scalars = [column for column in columns if column.is_scalar]
        alone = _alone(scalars) | _alone([column for column in scalars if column.table_type in ENCODED])
        self.names = {
            column.bare if column.name in alone and column.bare not in self.all else column.name: column.name
            for column in scalars
        }

    @property
    def kept(self) -> list[str]:
        """`names` of the columns that the job kept of its manifests."""
        return [name for name, full in self.names.items() if self.all[full].is_kept]

    def resolve(self, name: str) -> Column:
        """The column that `name` stands for.

        Raises:
            JobError: none, one of another sort, or one of several tables. SchemaError: none, where tables are damaged.
        """
        column = self.all.get(self.names.get(name, name))
        if column is not None and column.is_scalar:
            return column
        choice = [each for each in self._by_bare.get(name, ()) if self.all[each].is_scalar]
        if len(choice) > 1:
            raise JobError(f"column {name!r} is in several tables; choose one: {', '.join(choice)}")
        if column is not None or self._by_bare.get(name):
            raise JobError(f"column {name!r} holds lists; expected one of numbers, strings, truth values or times")
        if reasons := list(self._unreadable.values()):
            raise SchemaError(f"no column {name!r}; it may be of a table that cannot be read: {reasons[0]}")
        raise JobError(no_such("column", name, list(self.names)))

    def filter(self, where: str) -> Filter:
        """A filter over rows, by the names of columns in `all`.

        Raises:
            JobError: it is no expression over the columns, or not one that is true or false for each row.
        """
        chosen = parse_where(where, lambda name: self.resolve(name).name)
        types = {name: self.all[name].dtype for name in sorted(chosen.columns)}
        types = {name: pl.String() if dtype == pl.Categorical else dtype for name, dtype in types.items()}
        try:
            answer = pl.LazyFrame(schema=types).select(kept=chosen.expression).collect_schema()["kept"]
        except pl.exceptions.PolarsError as error:
            raise JobError(f"where: {where!r}: {first_line(error)}") from error
        if answer != pl.Boolean:
            raise JobError(f"where: {where!r} is of type {answer}; expected a condition, such as width > 500")
        return chosen


def _alone(columns: Sequence[Column]) -> set[str]:
    """Names of the columns whose bare name no other one of these has."""
    shared = Counter(column.bare for column in columns)
    return {column.name for column in columns if shared[column.bare] == 1}


def _tables(output: Folder, ids: Sequence[str]) -> list[tuple[str, tables.Record]]:
    """The run's tables that describe such rows, those that were encoded first."""
    records = {name: tables.record_to_go_on(output.sub(name)) for name in output.folders()}
    named = [
        (name, record)
        for name, record in records.items()
        if record is not None and (_key_of(record) in ids or _has_texts_of(record, ids))
    ]
    if any(record.table == "images" for _, record in named):
        named = [(name, record) for name, record in named if record.table != "region_pictures"]
    return sorted(named, key=lambda each: ROW_TABLES.index(each[1].table))


def _key_of(record: tables.Record) -> str:
    """The column whose value names a row of a table; "" where it is of another type."""
    if record.table in KEYS:
        return KEYS[record.table]
    if record.table not in ROW_TABLES:
        return ""
    fixed = {column["name"] for column in tables.table_schema(record.table)["columns"]}
    return [name for name in record.columns if name not in fixed][-1]


def _has_texts_of(record: tables.Record, ids: Sequence[str]) -> bool:
    """Whether a table has texts of images that are indexed."""
    return record.table == "texts" and "text_id" not in ids and "image_id" in ids and "image_id" in record.columns


def _columns(output: Folder, table: str, record: tables.Record, ids: Sequence[str]) -> Iterator[Column]:
    key = _key_of(record)
    if key not in ids:
        yield Column(f"{table}.text", "text", pl.String(), table, record.table, "text", "image_id", is_joined=True)
        return
    types = scan_table(output.sub(table).url).collect_schema()
    styles = _styles(output, table, record)
    for number, style in enumerate(styles or [""]):
        for source, dtype in types.items():
            is_vector = isinstance(dtype, pl.Array) and source != "box_xyxy"
            if source not in ids and source != "style" and not is_vector and (record.table, source) not in ELSEWHERE:
                bare = f"{source}_{style}" if number else source
                is_kept = source in (record.settings.get("keep") or ())
                yield Column(f"{table}.{bare}", bare, dtype, table, record.table, source, key, style, is_kept)


def _styles(output: Folder, table: str, record: tables.Record) -> list[str]:
    """The prompt styles of a table of labels; empty of another table."""
    if "style" not in record.columns or record.table != "labels":
        return []
    named = record.summary.get("styles")
    if named:
        return list(named)
    styles = scan_table(output.sub(table).url, ["style"]).select(pl.col("style").unique(maintain_order=True))
    return styles.collect(engine="streaming")["style"].to_list()
