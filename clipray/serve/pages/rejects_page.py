"""The pages of rejected rows: which, why, and the first bytes of what could not be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray import tables
from clipray.inputs.layout import Layout
from clipray.inputs.manifest import resolve
from clipray.report.run_tables import RunTable
from clipray.report.thumbnails import ImageSource
from clipray.serve.pages.layout import Pager, Site, page
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun
from clipray.serve.templating import path_of
from clipray.tables.reasons import Rejected
from clipray.tables.scan import scan_shards

ROWS = 50
FIRST_BYTES, LINE_BYTES = 64, 16
ABOUT = ("stage", "reason", "message")


@dataclass(frozen=True)
class Reason:
    """Rejected rows of a table by a reason. share: of the table's rows."""

    table: str
    reason: str
    rows: int
    share: float


@dataclass(frozen=True)
class RejectedRow:
    """A rejected row. named: its identity and source. bytes_at: the address of its first bytes, if it may have some."""

    stage: str
    reason: str
    message: str
    named: list[tuple[str, Any]]
    bytes_at: Markup | None


def rejects_page(request: Request) -> HTMLResponse:
    """GET /rejects?table=&reason=&page="""
    site = Site.of(request)
    reasons = list(_reasons(site.run))
    name, reason = (request.query_params.get(key, "") for key in ("table", "reason"))
    name = name or next((each.table for each in reasons), "")
    chosen = [each for each in reasons if each.table == name and reason in ("", each.reason)]
    pager = Pager.of(request, ROWS, sum(each.rows for each in chosen))
    rows = _rows(site, site.run.table(name), reason, pager) if name else []
    return page(request, "rejects.html", reasons=reasons, table=name, reason=reason, rows=rows, pager=pager)


def first_bytes_page(request: Request) -> HTMLResponse:
    """GET /rejects/TABLE/ID: the first bytes of the source of a rejected row, read where the row itself says."""
    site, row_id = Site.of(request), request.path_params["id"]
    table = site.run.table(request.path_params["table"])
    rows = _rejects(site.run, table).filter(pl.col("image_id") == row_id).head(1).collect().to_dicts()
    if not rows:
        raise HttpError(404, f"{table.name}: no rejected row {row_id[:200]!r}")
    try:
        data, problem = site.run.images.bytes_of(_source(table, rows[0])), ""
    except (Rejected, HttpError) as error:
        data, problem = b"", str(error)
    return page(
        request, "first_bytes.html", row_id=row_id, row=rows[0], table=table.name, problem=problem, size=len(data),
        lines=_hex_lines(data[:FIRST_BYTES]),
    )  # fmt: skip


def _reasons(run: ServedRun) -> Iterator[Reason]:
    for table in run.tables.tables:
        total = table.record.rows + table.record.rejects
        for reason, rows in sorted(table.record.rejects_by_reason.items(), key=lambda item: (-item[1], item[0])):
            yield Reason(table.name, reason, rows, rows / max(total, 1))


def _rejects(run: ServedRun, table: RunTable) -> pl.LazyFrame:
    """The rejects of a table. Raises HttpError 404: it has none."""
    folder = tables.rejects_of(run.output, table.name)
    names = tables.shard_names(folder) if table.record.rejects else []
    if not names:
        raise HttpError(404, f"{table.name}: no row was rejected")
    return scan_shards(folder, names)


def _rows(site: Site, table: RunTable, reason: str, pager: Pager) -> list[RejectedRow]:
    rows = _rejects(site.run, table)
    if reason:
        rows = rows.filter(pl.col("reason") == reason)
    return [_row(site, table, row) for row in rows.slice(pager.offset, ROWS).collect(engine="streaming").to_dicts()]


def _row(site: Site, table: RunTable, row: dict[str, Any]) -> RejectedRow:
    named = [(name, value) for name, value in row.items() if name not in ABOUT and value is not None]
    has_bytes = "uri" in row and row["image_id"] is not None
    at = site.link(f"/rejects/{path_of(table.name)}/{path_of(row['image_id'])}") if has_bytes else None
    return RejectedRow(row["stage"], row["reason"], row["message"], named, at)


def _source(table: RunTable, row: dict[str, Any]) -> ImageSource:
    manifests = tuple(map(str, table.record.inputs.get("manifest") or ()))
    layout = Layout.of_facts(table.record.inputs.get("layout", {}))
    uri = resolve(row.get("uri"), manifests[0] if manifests else "")
    return ImageSource(row["image_id"], uri, (0, 0), manifests, layout)


def _hex_lines(data: bytes) -> list[str]:
    """`offset  bytes  characters`, 16 bytes a line."""
    return [
        f"{start:08x}  {part.hex(' '):{3 * LINE_BYTES}} {''.join(chr(b) if 32 <= b < 127 else '.' for b in part)}"
        for start in range(0, len(data), LINE_BYTES)
        for part in [data[start : start + LINE_BYTES]]
    ]
