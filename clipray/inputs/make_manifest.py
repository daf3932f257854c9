"""Makes a manifest of a folder or a list of images."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote

import polars as pl
import pyarrow as pa

from clipray.errors import JobError
from clipray.inputs.image_listing import left_out_sentence, list_images, utf8_name
from clipray.inputs.image_lists import METADATA, STDIN, ImageList, ListOptions, is_list, read_list, with_metadata
from clipray.inputs.manifest import resolve
from clipray.storage.environment import environment_errors
from clipray.storage.folder import absolute, as_url, filesystem, split
from clipray.storage.parquet import write_parquet
from clipray.storage.uris import is_local, is_relative, parse


@environment_errors()
def make_manifest(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    label: Literal["folder"] | str | None = None,
    options: ListOptions | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Write a manifest of the images of a folder, glob or list (local or any fsspec URL).

    Args:
        source: a folder (searched recursively by file name suffix) or a glob, sorted by path; or a list of images in its
            own order: CSV, TSV, JSON Lines, COCO's JSON, a text file of paths, or `-` for standard input.
        out: the Parquet file to write, with columns `image_id`, `uri`, `label` when asked for, and those of a list or of
            an ImageFolder's metadata files. Without ids of its own an image's id is its path: relative to the folder, to
            the glob's fixed part, or as in the list.
        label: `folder` takes the name of the image's folder; anything else is a regular expression searched in
            `image_id`: its first group (or whole match) is the label; no match is null.
        options: what a list does not say itself.
        say: is told what is left out.

    A file name that is not UTF-8 is shown with escapes such as `\\xe9` in `image_id`, and is whole in `uri`.

    Returns:
        The number of images.

    Raises:
        ManifestError: no images there, or not a list of images.
        JobError: `label` is no regular expression, or a column of the list.
    """
    source, out = os.fspath(source), absolute(os.fspath(out))
    pattern = _label_pattern(label)
    listed = _of_list(source, out, options or ListOptions()) if is_list(source) else _of_folder(source, out)
    rows = listed.rows
    if label:
        if "label" in rows.columns:
            raise JobError(f"--label {label!r}: {source} has a column `label` already, which the manifest keeps")
        rows = rows.with_columns(label=_labels(rows, out, pattern))
    table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    write_parquet(table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema])), out)
    if say and listed.note:
        say(listed.note)
    return len(rows)


def _of_folder(source: str, out: str) -> ImageList:
    listing = list_images(source)
    ids = [utf8_name(os.path.relpath(path, listing.root)) for path in listing.paths]
    rows = pl.DataFrame(
        {"image_id": ids, "uri": [_uri(source, path, out) for path in listing.paths]},
        schema={"image_id": pl.String, "uri": pl.String},
    )
    metadata = [path for path in listing.others if posixpath.basename(path) in METADATA]
    note = left_out_sentence(path for path in listing.others if path not in metadata)
    if not metadata:
        return ImageList(rows, listing.root, note)
    known = with_metadata(rows, listing.root, metadata, filesystem(source)[0].cat_file)
    return ImageList(known.rows, listing.root, "; ".join(filter(None, (note, known.note))))


def _of_list(source: str, out: str, options: ListOptions) -> ImageList:
    listed = read_list(source if source == STDIN else absolute(source), options)
    folder = absolute(listed.folder)

    def address(uri: str | None) -> str | None:
        if not uri or not is_relative(uri):
            return uri
        if is_local(folder):
            return _uri(folder, posixpath.normpath(f"{folder}/{uri}"), out)
        return f"{folder}/{posixpath.normpath(uri)}"

    uris = [address(uri) for uri in listed.rows["uri"].to_list()]
    return ImageList(listed.rows.with_columns(uri=pl.Series(uris, dtype=pl.String)), folder, listed.note)


def _labels(rows: pl.DataFrame, out: str, pattern: re.Pattern[str] | None) -> pl.Series:
    """By the pattern in `image_id`, or without one the name of the folder that an image lies in."""
    if pattern is None:
        paths = [parse(resolve(uri, out) or "")[1] for uri in rows["uri"]]
        values: list[Any] = [utf8_name(posixpath.basename(posixpath.dirname(path))) or None for path in paths]
    else:
        matches = [pattern.search(image_id or "") for image_id in rows["image_id"]]
        values = [m and (m.group(1) if m.re.groups else m.group(0)) for m in matches]
    return pl.Series(values, dtype=pl.String)


def _uri(source: str, path: str, out: str) -> str:
    """Relative if the image lies under the manifest's folder, so that both can move together; else absolute."""
    if utf8_name(path) != path:
        return f"file://{quote(os.fsencode(path))}"
    relative = path.removeprefix(split(out)[0].rstrip("/") + "/")
    if not is_local(source) or not is_local(out) or resolve(relative, out) != path:
        return as_url(path, source)
    return relative


def _label_pattern(label: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(label) if label and label != "folder" else None
    except re.error as error:
        raise JobError(f"--label {label!r}: expected `folder` or a regular expression: {error}") from error


def _plain(arrow_type: pa.DataType) -> pa.DataType:
    """The type without Polars' 64-bit offsets, which other readers of Parquet do not need."""
    if pa.types.is_large_string(arrow_type):
        return pa.string()
    if pa.types.is_large_list(arrow_type):
        return pa.list_(_plain(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_plain(field.type)) for field in arrow_type])
    return arrow_type
