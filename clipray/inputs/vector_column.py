"""Vector columns as inputs: `images.clip`, a table of another run, or any Parquet; read row group by row group."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.moments import first_bad_rows
from clipray.analysis.normalize import LONGEST, first_long_rows, surely_usable
from clipray.errors import JobError, SchemaError
from clipray.inputs.parquet_files import File, as_utf8, common_type, expand_parquet, is_list_type, is_text, read_footer
from clipray.job import Column
from clipray.storage.folder import Folder, absolute, file_versions
from clipray.storage.parquet import RowGroup
from clipray.tables.arrays import numbers
from clipray.tables.digests import Digest, digest_of, file_version, files_digest, plain

IDENTITIES = ("image_id", "region_id", "text_id", "cloud_id")
"""Columns that identify rows of our tables. Tables made from a table get those that it has. (A text's `image_id` does not
identify it, and may be null.)"""


@dataclass(frozen=True)
class VectorColumn:
    """An opened vector column; no rows are read yet.

    Attributes:
        name: what the job calls it. column: the vector column.
        ids: columns that are carried along, the last of which names a row.
        identity: what decides the values: the table's fingerprint, or the path; `digest`: of the very files.
        provenance: what made the table, where it is one of ours.
        files: of each path in `row_groups`, what tells whether it is still the same file.
        n_features: width of the vectors.
        schema: of the first file.
    """

    name: str
    column: str
    ids: tuple[str, ...]
    identity: dict[str, Any]
    digest: Digest
    provenance: dict[str, Any]
    files: dict[str, str]
    n_features: int = 0
    row_groups: tuple[RowGroup, ...] = ()
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))

    @property
    def n_samples(self) -> int:
        return sum(row_group.rows for row_group in self.row_groups)

    @property
    def space(self) -> dict[str, Any]:
        """What two columns must share to be compared; empty if unknown."""
        provenance = self.provenance
        if "space" in provenance:
            return dict(provenance["space"])
        if "model" not in provenance:
            return {}
        model = {key: provenance["model"].get(key) for key in ("name", "weights", "preprocess")}
        return {
            "model": model, "feature": provenance.get("features", {}).get(self.column), "preprocess": provenance.get("preprocess"),
            "normalize": provenance.get("normalize"),
        }  # fmt: skip

    @property
    def id_fields(self) -> list[pa.Field]:
        return [pa.field(name, pa.string(), nullable=False) for name in self.ids]


def comparable(space: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why vectors of two spaces (`VectorColumn.space`) cannot be compared; "" if they can, or if one is unknown."""
    if not space or not other or space == other:
        return ""
    models = [_name_and_weights(each["model"]) if "model" in each else None for each in (space, other)]
    if None in models:
        return "one of them is a reduction; reduce the other with `fit`"
    if models[0] != models[1]:
        return f"they are of two models, {models[0][0]} and {models[1][0]}, or of other weights"  # type: ignore[index]
    layers = [layer_of(each) for each in (space, other)]
    return "" if layers == ["output", "output"] else f"they are of two layers, {layers[0]!r} and {layers[1]!r}"


def refuse_other_space(step: str, queries: VectorColumn, source: VectorColumn) -> None:
    """Raises SchemaError where `queries` cannot be compared with the vectors of `source`."""
    if queries.n_features != source.n_features:
        raise SchemaError(
            f"{step}: queries {queries.name} are vectors of {queries.n_features}, {source.name} has {source.n_features}"
        )
    if reason := comparable(source.space, queries.space):
        raise SchemaError(f"{step}: queries {queries.name} and {source.name} cannot be compared: {reason}")


def layer_of(space: Mapping[str, Any]) -> Any:
    """The layer that the vectors of a space come from; None if unknown."""
    feature = space.get("feature")
    return feature.get("layer") if isinstance(feature, Mapping) else feature


def same_model(vectors: VectorColumn, model: Mapping[str, Any]) -> bool:
    """Whether a column's vectors can be compared with those that `model` makes of texts and images.

    `model` is an identity as `ResolvedModel.identity()` gives it, or the `model` of another column's `space`. Name and
    weights must be the same, and the column must be the network's output; normalisation makes no difference to a cosine.
    A column that does not say where it comes from is accepted: its owner knows.
    """
    space = vectors.space
    if not space:
        return True
    return layer_of(space) == "output" and _name_and_weights(space.get("model") or {}) == _name_and_weights(model)


def _name_and_weights(model: Mapping[str, Any]) -> tuple[str, Any]:
    """What identifies a model, wherever its `local-dir:` is."""
    return str(model.get("name")).split(":/")[0], model.get("weights")


def refuse_another_model(vectors: VectorColumn, model: Mapping[str, Any], n_features: int) -> None:
    """Raises SchemaError: the column is of another model than `model`, or not its output."""
    wanted = f"{model.get('name')} ({str(model.get('weights'))[:19]}…)"
    if not same_model(vectors, model):
        space = vectors.space
        other, feature = space.get("model"), space.get("feature")
        actual = (
            f"{feature!r} of {other.get('name')} ({str(other.get('weights'))[:19]}…)"
            if other
            else "made of such vectors"
        )
        raise SchemaError(
            f"input {vectors.name}: expected the output of {wanted}, the step's model, but it is {actual}; "
            "texts and images are comparable in one model's space only"
        )
    if vectors.n_features != n_features:
        raise SchemaError(
            f"input {vectors.name}: vectors of {vectors.n_features}, but {wanted} makes vectors of {n_features}"
        )


def open_vectors(source: str | Column, output: Folder) -> VectorColumn:
    """Open an input of a step.

    Args:
        source: `table.column` of the run at `output`, `FOLDER/table.column` of another, or a `Column` of any Parquet.

    Raises:
        JobError: it is not written as one of those.
        SchemaError: the table is not finished or has changed since, there is no such column, or it holds no vectors.
        ManifestError: no Parquet there.
    """
    if isinstance(source, Column):
        return _open_any(source)
    return _open_table(source, *table_and_column(source, output))


def table_and_column(source: str, output: Folder) -> tuple[Folder, str]:
    """The table's folder and the column of `table.column` or `FOLDER/table.column`. Raises JobError: it is neither."""
    table, _, column = source.rpartition(".")
    if not table or not column or "/" in column:
        raise JobError(
            f"{source!r}: expected `table.column`, `FOLDER/table.column`, or a mapping with `path`, `column` and `id`"
        )
    return output.named(table), column


def _open_table(name: str, folder: Folder, column: str) -> VectorColumn:
    record = tables.finished(folder, f"input {name}")
    vectors = [n for n, stored in record.columns.items() if stored.startswith("fixed_size_list") and n != "box_xyxy"]
    if column not in vectors:
        raise SchemaError(f"input {name}: no vector column {column!r} in {folder.url}; there are: {', '.join(vectors)}")
    if not tables.intact(folder, record):
        raise SchemaError(
            f"input {name}: the files of {folder.url} are not those of its {tables.RECORD}; `clipray run` repairs it"
        )
    urls = [folder.path(file["name"]) if folder.local else f"{folder.url}/{file['name']}" for file in record.files]
    ids = tuple(n for n in IDENTITIES if n in record.columns)
    ids = ("text_id",) if "text_id" in ids else ids
    identity = {"table": record.fingerprint, "column": column}
    versions = {url: json.dumps(file_version(file)) for url, file in zip(urls, record.files, strict=True)}
    return _with_rows_of(
        VectorColumn(name, column, ids, identity, files_digest(record.files), record.provenance, versions)
    )


def _open_any(source: Column) -> VectorColumn:
    urls = expand_parquet(absolute(source.path))
    identity = {"path": absolute(source.path), "column": source.column, "id": source.id}
    files = file_versions(urls)
    versions = dict(zip(urls, map(json.dumps, files), strict=True))
    digest = plain(digest_of(files))
    return _with_rows_of(VectorColumn(source.path, source.column, (source.id,), identity, digest, {}, versions))


def _with_rows_of(vectors: VectorColumn) -> VectorColumn:
    """The column with what the footers of its files say."""
    name, files = vectors.name, [file for url in vectors.files if (file := read_footer(url)).rows]
    if not files:
        raise SchemaError(f"input {name}: the table has no rows")
    widths = []
    for file in files:
        _check_columns(vectors, file)
        widths.append(_width(vectors, file))
        if widths[-1] != widths[0]:
            raise SchemaError(f"input {name}: vectors of {widths[-1]} in {file.url}, of {widths[0]} in {files[0].url}")
    starts = itertools.accumulate((file.rows for file in files), initial=0)
    row_groups = tuple(
        replace(row_group, first_row=start + row_group.first_row)
        for start, file in zip(starts, files)
        for row_group in file.row_groups
        if row_group.rows
    )
    return replace(vectors, n_features=widths[0], row_groups=row_groups, schema=_common_schema(files))


def _check_columns(vectors: VectorColumn, file: File) -> None:
    file.refuse_without((vectors.column, *vectors.ids), f"input {vectors.name}: ")
    for wanted in vectors.ids:
        arrow_type = file.schema.field(wanted).type
        try:
            pa.nulls(0, arrow_type).cast(pa.string())
        except pa.ArrowNotImplementedError as error:
            raise SchemaError(
                f"input {vectors.name}: column {wanted!r} of {file.url} is {arrow_type}; expected what names a row: strings, whole numbers or UUIDs"
            ) from error


def _common_schema(files: Sequence[File]) -> pa.Schema:
    """The schema of the first file; a column of several types gets one that can hold all values, if there is one."""
    schema = files[0].schema
    for at, name in enumerate(schema.names):
        types = [file.schema.field(name).type for file in files if file.schema.names.count(name) == 1]
        common = common_type(types) if types else None
        schema = schema.set(at, schema.field(at).with_type(common or schema.field(at).type))
    return schema


def _width(vectors: VectorColumn, file: File) -> int:
    """Width of the vectors; for plain lists, the length of the first."""
    column, arrow_type = vectors.column, file.schema.field(vectors.column).type
    if not is_list_type(arrow_type) or not pa.types.is_floating(arrow_type.value_type):
        raise SchemaError(
            f"input {vectors.name}: column {column!r} of {file.url} is {arrow_type}; expected lists of float16, float32 or float64"
        )
    if pa.types.is_fixed_size_list(arrow_type):
        return int(arrow_type.list_size)
    first = next(file.whole.stream([column], 1))
    return len(first[column][0].as_py() or ())


def read_vectors(vectors: VectorColumn, row_group: RowGroup, extra: Sequence[str] = ()) -> tuple[pa.Table, np.ndarray]:
    """(table of the identity columns and `extra`, (n, d) matrix of the column's own float type).

    Raises:
        SchemaError: a null vector or id, a vector of another width, or a string that is not UTF-8; with the row.
    """
    columns = list(dict.fromkeys([*vectors.ids, *extra, vectors.column]))
    table = row_group.read(columns)
    column = table[vectors.column].combine_chunks()
    lengths = None if pa.types.is_fixed_size_list(column.type) else np.diff(numbers(column.offsets))
    wrong = np.zeros(len(column), bool) if lengths is None else lengths != vectors.n_features
    if column.null_count:
        wrong |= column.is_null().to_numpy(zero_copy_only=False)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        value = "null" if lengths is None else f"{int(lengths[row])} values"
        raise SchemaError(
            f"{row_group.path}: row {row} of row group {row_group.number}: expected a vector of {vectors.n_features}, found {value}"
        )
    values = column.flatten()
    if values.null_count:
        raise SchemaError(
            f"{row_group.path}: row group {row_group.number} has vectors with null values in column {vectors.column!r}"
        )
    companions = {name: _companion(vectors, row_group, name, table[name]) for name in columns if name != vectors.column}
    fields = [pa.field(name, part.type, name not in vectors.ids) for name, part in companions.items()]
    ids = pa.table(list(companions.values()), schema=pa.schema(fields))
    return ids, numbers(values).reshape(-1, vectors.n_features)


def _companion(vectors: VectorColumn, row_group: RowGroup, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """An id column as strings, or another column in its type of all files."""
    where = f"{row_group.path}: row group {row_group.number}"
    if name in vectors.ids and column.null_count:
        raise SchemaError(f"{where} has rows without {name!r}")
    if name not in vectors.ids and not is_text(column.type):
        return _cast(where, name, column, vectors.schema.field(name).type)
    texts, broken = as_utf8(column)
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise SchemaError(f"{where}, row {row}: {name!r} is not UTF-8: {texts[row].as_py()}")
    return texts if name in vectors.ids else _cast(where, name, column, vectors.schema.field(name).type)


def _cast(where: str, name: str, column: pa.ChunkedArray, arrow_type: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(arrow_type)
    except pa.ArrowException as error:
        raise SchemaError(f"{where}: column {name!r}: {error}") from error


def read_finite(source: VectorColumn, row_group: RowGroup, extra: Sequence[str] = ()) -> tuple[pa.Table, np.ndarray]:
    """Identities (with `extra`) and vectors (n, d). Raises SchemaError: some are not finite, or longer than float32 can
    square; with the first rows' ids."""
    ids, x = read_vectors(source, row_group, extra)
    if surely_usable(x):
        return ids, x
    for bad, what in ((first_bad_rows(x), "are not finite"), (first_long_rows(x), f"are longer than {LONGEST:g}")):
        if len(bad):
            named = ", ".join(map(repr, ids[source.ids[-1]].take(pa.array(bad)).to_pylist()))
            raise SchemaError(
                f"{source.name}: vectors that {what}, {source.ids[-1]}: {named}; repair, scale or drop these rows"
            )
    return ids, x


def read_ids(vectors: VectorColumn, row_group: RowGroup) -> pa.Array:
    """The ids of the rows of a row group, as strings; their vectors are not read."""
    name = vectors.ids[-1]
    return _companion(vectors, row_group, name, row_group.read([name])[name]).combine_chunks()
