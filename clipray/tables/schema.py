"""The schemas of all tables, `schemas/*.json`, which people and other tools can read too, and checks against them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import SchemaError

ARROW_TYPES = {
    "string": pa.string(), "binary": pa.binary(), "int32": pa.int32(), "int64": pa.int64(), "bool": pa.bool_(),
    "float32": pa.float32(), "float64": pa.float64(),
    "box": pa.list_(pa.field("element", pa.float32(), nullable=False), 4),
    "ranking": pa.list_(
        pa.field("element", pa.struct([pa.field("label", pa.string(), False), pa.field("probability", pa.float32(), False)]), False)
    ),
    "neighbors": pa.struct([
        pa.field("ids", pa.list_(pa.field("element", pa.string(), nullable=False))),
        pa.field("distances", pa.list_(pa.field("element", pa.float32(), nullable=False))),
    ]),
}  # fmt: skip
ELEMENTS = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}


@functools.cache
def _schema_folder() -> Path:
    package = Path(__file__).parents[1]
    packaged = package / "schemas"  # in a wheel; in a checkout they lie beside the package
    return packaged if packaged.is_dir() else package.parent / "schemas"


def table_names() -> list[str]:
    """Names of all table types, sorted."""
    return sorted(path.stem for path in _schema_folder().glob("*.json") if path.name != "job.schema.json")


@functools.cache
def table_schema(table: str) -> dict[str, Any]:
    """The schema of a table type, as `schemas/<table>.json` holds it. Treat it as read-only.

    Raises:
        SchemaError: there is no such table.
    """
    if table not in table_names():
        raise SchemaError(f"no table {table!r}; there are: {', '.join(table_names())}")
    return json.loads((_schema_folder() / f"{table}.json").read_text(encoding="utf-8"))


def vector_type(width: int, element: str = "float32") -> pa.DataType:
    """Arrow type of a vector column: `fixed_size_list<element not null>[width]`."""
    return pa.list_(pa.field("element", ELEMENTS[element], nullable=False), width)


def fits(x: np.ndarray, column_type: pa.FixedSizeListType) -> bool:
    """Whether all values of `x` are finite in a vector column of this type: float16 ends at 65,504."""
    return bool((np.abs(x) <= np.finfo(column_type.value_type.to_pandas_dtype()).max).all())


def arrow_schema(
    table: str,
    vectors: Mapping[str, int] | None = None,
    *,
    element: str = "float32",
    extra: Sequence[pa.Field] = (),
) -> pa.Schema:
    """The Arrow schema of a table: the fixed columns, a vector column per name in `vectors` (name -> width), `extra`."""
    spec = table_schema(table)
    fields = [
        pa.field(c["name"], ARROW_TYPES[c["type"]], c["nullable"], {key: c[key] for key in ("doc", "unit") if key in c})
        for c in spec["columns"]
        if c["type"] in ARROW_TYPES and not c["name"].startswith("<") and not c.get("optional")
    ]
    fields += [pa.field(name, vector_type(width, element), False) for name, width in (vectors or {}).items()]
    return pa.schema([*fields, *extra])


def rejects_schema(*names: str) -> pa.Schema:
    """The Arrow schema of a table's rejects: `names` say which row it was (its identity first), the rest why."""
    return pa.schema([*(pa.field(name, pa.string()) for name in names), *arrow_schema("rejects")])


def check(table: str, data: pa.Table, schema: pa.Schema) -> None:
    """Refuse data that is not what `schema` says: names, types, nulls, closed sets of values.

    Raises:
        SchemaError: naming the column, what was expected and what was found.
    """
    if data.schema.names != schema.names:
        raise SchemaError(f"{table}: expected columns {schema.names}, found {data.schema.names}")
    for expected, column in zip(schema, data.columns, strict=True):
        if column.type != expected.type:
            raise SchemaError(f"{table}.{expected.name}: expected {expected.type}, found {column.type}")
        if not expected.nullable and column.null_count:
            raise SchemaError(
                f"{table}.{expected.name}: expected no nulls, found {column.null_count} in {len(column)} rows"
            )
    for spec in table_schema(table)["columns"]:
        if "values" in spec and data.num_rows:
            patterns = spec.get("patterns", ())
            values = set(pc.unique(data[spec["name"]]).to_pylist()) - set(spec["values"])
            unexpected = {value for value in values if not any(re.fullmatch(p, value) for p in patterns)}
            if unexpected:
                raise SchemaError(f"{table}.{spec['name']}: {sorted(unexpected)} not in {spec['values']}")
