"""Lists of images as people keep them: CSV, TSV, JSON Lines, COCO's JSON, plain paths, and ImageFolder's metadata."""

from __future__ import annotations

import io
import os
import posixpath
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import polars as pl

from clipray.errors import ManifestError, no_such, one_line
from clipray.inputs.coco import coco_images
from clipray.inputs.image_listing import IMAGE_SUFFIXES, is_hidden, left_out_sentence, utf8_name
from clipray.storage.folder import explained, filesystem, split
from clipray.storage.uris import is_local

STDIN = "-"
URIS = (
    "uri", "url", "file_name", "filename", "file_path", "filepath", "path", "image_path", "image_url", "image", "file",
)  # fmt: skip
"""Names, in small letters, of the column that says where an image is, the likeliest first."""
IDS = ("image_id", "id", "key")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files in which an ImageFolder has columns for its images, by `file_name`."""
FILE_NAME = "file_name"
NAMED = 3  # examples in a message


@dataclass(frozen=True, eq=False)
class ImageList:
    """A list of images.

    Attributes:
        rows: `image_id`, `uri`, and the list's other columns.
        folder: a path or URL, which relative URIs are relative to.
        note: a sentence about what was left out, or "".
    """

    rows: pl.DataFrame
    folder: str
    note: str = ""


@dataclass(frozen=True)
class ListOptions:
    """What a list does not say itself.

    Attributes:
        uri, image_id: its columns; None: the first that has a usual name; without ids the URIs are the ids.
        images: the folder that relative URIs are relative to; None: the list's own.
    """

    uri: str | None = None
    image_id: str | None = None
    images: str | None = None


def is_list(source: str) -> bool:
    """Whether `source` names a list of images, not a folder, glob or manifest of them."""
    return source == STDIN or _suffix(source) in _READERS


def read_list(source: str, options: ListOptions) -> ImageList:
    """Read a list of images; `-` is standard input, a path in each line.

    Raises:
        ManifestError: no such file, not a list of images, or no column that says where they are.
        StorageError: it cannot be read.
    """
    suffix = ".txt" if source == STDIN else _suffix(source)
    return _READERS[suffix](source, _bytes_of(source), options)


def with_metadata(rows: pl.DataFrame, root: str, files: Sequence[str], read: Callable[[str], bytes]) -> ImageList:
    """The images of a folder (`image_id`: the path within it) with the columns of its metadata files, null where these say nothing.

    Raises:
        ManifestError: a metadata file without a column `file_name`, or one that cannot be read.
    """
    parts = []
    for path in files:
        frame = _table(path, read(path))
        if FILE_NAME not in frame.columns:
            raise ManifestError(
                f"{path}: {no_such('column', FILE_NAME, frame.columns)}; it names the images that a row is about"
            )
        within = posixpath.relpath(posixpath.dirname(path), root)
        names = _texts(path, frame, FILE_NAME)
        paths = [name and posixpath.normpath(posixpath.join(within, name)) for name in names]
        parts.append(frame.select(pl.exclude(FILE_NAME, "image_id", "uri"), image_id=pl.Series(paths, dtype=pl.String)))
    try:
        together = pl.concat(parts, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise ManifestError(
            f"{root}: columns of its metadata files have types that differ: {one_line(error)}"
        ) from error
    known = together.unique("image_id", keep="first", maintain_order=True)
    lost = known.join(rows, on="image_id", how="anti")["image_id"]
    note = ""
    if len(lost):
        named = ", ".join(lost.head(NAMED)) + (", …" if len(lost) > NAMED else "")
        note = f"images that the metadata names and that are not there: {len(lost)}, {named}"
    return ImageList(rows.join(known, on="image_id", how="left", maintain_order="left"), root, note)


def _table(source: str, data: bytes, as_text: Sequence[str | None] = ()) -> pl.DataFrame:
    """The rows of a CSV, TSV, JSON Lines or Parquet file.

    Columns of numbers in a CSV become numbers, but for those that a number may name an image in: `as_text` and usual names.
    """
    suffix = _suffix(source)
    try:
        if suffix == ".parquet":
            return pl.read_parquet(io.BytesIO(data))
        if suffix in (".jsonl", ".ndjson"):
            return pl.read_ndjson(io.BytesIO(data), infer_schema_length=None)
        frame = pl.read_csv(io.BytesIO(data), separator=_separator(suffix, data), infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        first = data.split(b"\n", 1)[0][:80].decode("utf-8", "backslashreplace").strip()
        expected = "JSON, an object in each line" if suffix in (".jsonl", ".ndjson") else "UTF-8 with a header line"
        raise ManifestError(
            f"{source}: expected {expected}; {str(error).splitlines()[0]}; the first line is {first!r}"
        ) from error
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in frame.columns):
        raise ManifestError(
            f"{source}: expected a header line with the columns' names, found {', '.join(frame.columns)!r}"
        )
    texts = (*URIS, *IDS)
    return frame.with_columns(
        column if column.name in as_text or column.name.lower() in texts else _typed(column) for column in frame
    )


def _texts(source: str, frame: pl.DataFrame, name: str) -> list[str | None]:
    """A column's values as strings. Raises ManifestError: it holds lists or objects."""
    column = frame[name]
    if column.dtype.is_nested():
        raise ManifestError(
            f"{source}: column {name!r} holds {column.dtype}, expected a string or a number in each row"
        )
    return column.cast(pl.String).to_list()


def _typed(column: pl.Series) -> pl.Series:
    """Strings as numbers where all of them are, none with a 0 before it: `007` is a name."""
    if column.null_count() == len(column) or column.str.contains(r"^[+-]?0\d").any():
        return column
    for dtype in (pl.Int64, pl.Float64):
        numbers = column.cast(dtype, strict=False)
        if numbers.null_count() == column.null_count():
            return numbers
    return column


def _separator(suffix: str, data: bytes) -> str:
    header = data.split(b"\n", 1)[0]
    return "\t" if suffix == ".tsv" else ";" if b";" in header and b"," not in header else ","


def _of_table(source: str, data: bytes, options: ListOptions) -> ImageList:
    frame = _table(source, data, (options.uri, options.image_id))
    if frame.is_empty():
        raise ManifestError(f"{source}: expected a row for each image, found none below the names of the columns")
    uri = _column(source, frame, options.uri, URIS)
    if uri is None:
        raise ManifestError(
            f"{source}: no column says where the images are, found: {', '.join(frame.columns)}; name it with `--uri COLUMN`"
        )
    image_id = _column(source, frame, options.image_id, IDS)
    others = [name for name in frame.columns if name not in (uri, image_id, "uri", "image_id")]
    named = {"image_id": _texts(source, frame, image_id or uri), "uri": _texts(source, frame, uri)}
    rows = pl.DataFrame(named, schema=dict.fromkeys(named, pl.String)).hstack(frame.select(others))
    return ImageList(rows, options.images or split(source)[0])


def _column(source: str, frame: pl.DataFrame, named: str | None, usual: Sequence[str]) -> str | None:
    """The column of this name, or the first of a usual one."""
    if named is not None:
        if named not in frame.columns:
            raise ManifestError(f"{source}: {no_such('column', named, frame.columns)}")
        return named
    by_name = {name.lower(): name for name in reversed(frame.columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def _of_paths(source: str, data: bytes, options: ListOptions) -> ImageList:
    """Paths and URLs, one in each line. Of local files only images are taken, as from a folder."""
    lines = [line for line in os.fsdecode(data).splitlines() if line.strip()]
    images = [line for line in lines if not is_local(line) or _is_image(line)]
    if not images:
        raise ManifestError(f"{source}: expected an image's path or URL in each line, found none in {len(lines)} lines")
    left_out = left_out_sentence(line for line in lines if is_local(line) and not _is_image(line))
    folder = options.images or (os.getcwd() if source == STDIN else split(source)[0])
    names = [line.removeprefix("./") for line in images]
    rows = {"image_id": [utf8_name(name) for name in names], "uri": [_utf8_uri(name, folder) for name in names]}
    return ImageList(pl.DataFrame(rows), folder, left_out)


def _utf8_uri(path: str, folder: str) -> str:
    """The path itself, or a file URI of one that is not UTF-8, which no table can hold."""
    if utf8_name(path) == path:
        return path
    return f"file://{quote(os.fsencode(posixpath.normpath(posixpath.join(folder, path))))}"


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES) and not any(
        is_hidden(part) for part in path.split("/") if part not in (".", "..")
    )


def _of_coco(source: str, data: bytes, options: ListOptions) -> ImageList:
    rows, folder, note = coco_images(source, data, options.images)
    return ImageList(rows, folder, note)


_READERS: dict[str, Callable[[str, bytes, ListOptions], ImageList]] = {
    ".csv": _of_table, ".tsv": _of_table, ".jsonl": _of_table, ".ndjson": _of_table, ".txt": _of_paths, ".json": _of_coco,
}  # fmt: skip


def _suffix(source: str) -> str:
    return posixpath.splitext(source)[1].lower()


def _bytes_of(source: str) -> bytes:
    if source == STDIN:
        return sys.stdin.buffer.read()
    fs, path = filesystem(source)
    try:
        with explained(source):
            return fs.cat_file(path)
    except FileNotFoundError as error:
        raise ManifestError(f"{source}: no such file") from error
