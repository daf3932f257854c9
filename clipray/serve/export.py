"""What is shown, as a file: CSV, Parquet, or a manifest of these images for another job."""

from __future__ import annotations

import io
from typing import Any

import polars as pl
from starlette.responses import Response

from clipray.errors import JobError
from clipray.serve.state import ServedRun

TYPES = {
    "csv": ("text/csv; charset=utf-8", "csv"),
    "parquet": ("application/vnd.apache.parquet", "parquet"),
    "manifest": ("application/vnd.apache.parquet", "parquet"),
}


def export(run: ServedRun, hits: list[dict[str, Any]], file_format: str) -> Response:
    """The hits as a file to download. Raises JobError: no such format."""
    if file_format not in TYPES:
        raise JobError(f"format: expected one of {', '.join(TYPES)}, found {file_format[:20]!r}")
    frame = pl.DataFrame(hits, schema=None if hits else {"image_id": pl.String}, infer_schema_length=None)
    sink = io.BytesIO()
    if file_format == "csv":
        _without_formulas(_flat(frame)).write_csv(sink)
    elif file_format == "parquet":
        frame.write_parquet(sink)
    else:
        _manifest(run, frame).write_parquet(sink)
    media_type, suffix = TYPES[file_format]
    name = "manifest" if file_format == "manifest" else "search"
    headers = {"Content-Disposition": f'attachment; filename="{name}.{suffix}"'}
    return Response(sink.getvalue(), media_type=media_type, headers=headers)


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """CSV has no lists."""
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    texts = [
        pl.Series(name, [None if v is None else str(v) for v in frame[name].to_list()], pl.String) for name in nested
    ]
    return frame.with_columns(texts)


def _without_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """Strings that a spreadsheet would run get an apostrophe in front."""
    runs = pl.col(pl.String).str.contains(r"^[=+\-@\t\r]")
    return frame.with_columns(
        pl.when(runs).then(pl.lit("'") + pl.col(pl.String)).otherwise(pl.col(pl.String)).name.keep()
    )


def _manifest(run: ServedRun, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of these images with their `uri`, each once, or their bytes where a manifest holds them."""
    names = frame["image_id"].unique(maintain_order=True).to_list() if len(frame) else []
    sources = [(name, run.images.source(name)) for name in names]
    rows = {
        "image_id": [name for name, source in sources if source],
        "uri": [source.uri for _, source in sources if source],
        "bytes": [None if source.uri else run.images.bytes_of(source) for _, source in sources if source],
    }
    manifest = pl.DataFrame(rows, schema={"image_id": pl.String, "uri": pl.String, "bytes": pl.Binary})
    manifest = manifest.drop([name for name in ("uri", "bytes") if manifest[name].null_count() == len(manifest)])
    kept = frame.drop(
        [name for name in ("rank", "score", *manifest.columns) if name in frame.columns and name != "image_id"]
    )
    return manifest.join(kept.unique("image_id", maintain_order=True), on="image_id", how="left", maintain_order="left")
