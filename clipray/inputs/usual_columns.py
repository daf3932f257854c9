"""Recognises the columns of Parquet that is no manifest by their usual names and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from clipray.errors import ManifestError
from clipray.inputs.image_listing import IMAGE_SUFFIXES
from clipray.inputs.image_lists import IDS, URIS
from clipray.inputs.layout import STATUS, WHY, is_image
from clipray.inputs.parquet_files import File, expand_parquet, is_binary, is_id, is_text, read_footer
from clipray.storage.folder import absolute

BYTES = ("bytes", "image_bytes", "image", "img", *(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
"""Names, in small letters, of the column that holds images."""


def usual_columns(source: str, uri: str | None = None, image_id: str | None = None) -> dict[str, Any]:
    """The names of a manifest's columns in Parquet of images, as a job's `manifest` has them; empty where they are its own.

    Images are in a struct of `bytes` and `path` as Hugging Face writes it, in a column of bytes, or at URIs. Rows without
    ids get them of their file and number. Of img2dataset's rows only those that it could download are taken.

    Args:
        uri, image_id: names of columns that need not be guessed.

    Raises:
        ManifestError: no Parquet, or no column that says where the images are.
    """
    files = (read_footer(url) for url in expand_parquet(absolute(source)))
    first = next(files)
    file = first if first.rows else next((one for one in files if one.rows), first)
    names = file.schema.names
    for column in filter(None, (uri, image_id)):
        file.refuse_without([column], error=ManifestError)
    columns: dict[str, Any] = {"uri": uri} if uri else _images(file)
    columns["image_id"] = image_id or _first(file, IDS, is_id) or {"from": "row"}
    if {STATUS, WHY} <= set(names):
        columns |= {STATUS: STATUS, WHY: WHY}
    return {} if all(name == column for name, column in columns.items()) else columns


def _images(file: File) -> dict[str, Any]:
    """Where the images are: `bytes` with or without `uri`, or `uri`."""
    structs = [one.name for one in file.schema if is_image(one.type)]
    data, uri = _first(file, BYTES, is_binary), _first(file, URIS, is_text)
    if "bytes" in file.schema.names or (data and not structs):
        return {"bytes": data, **({"uri": "uri"} if "uri" in file.schema.names else {})}
    if len(structs) == 1 and "uri" not in file.schema.names:
        return {"bytes": f"{structs[0]}.bytes"}
    if uri is None:
        raise ManifestError(
            f"{file.url}: no column says where the images are, found: {', '.join(file.schema.names)}; name it with `--uri COLUMN`"
        )
    return {"uri": uri}


def _first(file: File, usual: Sequence[str], fits: Callable[[pa.DataType], bool]) -> str | None:
    """The column with the likeliest of the usual names, whose type fits."""
    by_name = {one.name.lower(): one.name for one in reversed(list(file.schema)) if fits(one.type)}
    return next((by_name[name] for name in usual if name in by_name), None)
