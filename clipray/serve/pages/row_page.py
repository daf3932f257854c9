"""One row with everything that the run knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from clipray.errors import ClipRayError
from clipray.queries.searcher import Searcher
from clipray.report.run_tables import RunTable
from clipray.serve.pages.layout import Site, page
from clipray.serve.pages.tiles import Tile, tiles_of_hits
from clipray.serve.rows import everything_of
from clipray.serve.state import ServedRun
from clipray.serve.templating import path_of

NEIGHBOURS = 12
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Box:
    """A region on the image, in px of it."""

    region_id: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Labelling:
    """The labels of the row by a table in a style, the most probable first. link: all rows of the first label."""

    title: str
    ranking: list[tuple[str, float]]
    link: Markup


@dataclass(frozen=True)
class Picture:
    """The image of the row. size: width and height in px, as people see it."""

    image_id: str
    size: tuple[int, int]
    uri: str
    boxes: list[Box]


def row_page(request: Request) -> HTMLResponse:
    """GET /rows/ID"""
    site, row_id = Site.of(request), request.path_params["id"]
    tables: dict[str, Rows] = everything_of(site.run, row_id)["tables"]
    opened = {table.name: table for table in site.run.tables.tables if table.name in tables}
    first = next(iter(tables.values()))[0]
    neighbours, index = _neighbours(site.run, row_id)
    return page(
        request, "row.html", row_id=row_id, picture=_picture(site.run, row_id, opened, tables), text=_text(row_id, tables, opened),
        labellings=_labellings(site, opened, tables), links=_links(site, opened, tables), neighbours=neighbours,
        index=index, tables=tables, image_id=first.get("image_id"),
    )  # fmt: skip


def _picture(run: ServedRun, row_id: str, opened: Mapping[str, RunTable], tables: Mapping[str, Rows]) -> Picture | None:
    """The image of the row, with its regions if it has some."""
    rows = [row for name, of_table in tables.items() for row in of_table if opened[name].type != "texts"]
    image_id = next((row["image_id"] for row in rows if row.get("image_id")), row_id)
    source = run.images.source(image_id)
    if source is None:
        return None
    boxes = [
        _box(row) for name, of_table in tables.items() if opened[name].type == "regions" for row in of_table
        if row.get("box_xyxy")
    ]  # fmt: skip
    return Picture(image_id, source.size, str(source.uri or ""), boxes)


def _box(row: Mapping[str, Any]) -> Box:
    left, top, right, bottom = row["box_xyxy"]
    return Box(row["region_id"], left, top, right - left, bottom - top)


def _text(row_id: str, tables: Mapping[str, Rows], opened: Mapping[str, RunTable]) -> str | None:
    texts = [row for name, rows in tables.items() if opened[name].type == "texts" for row in rows]
    return next((row["text"] for row in texts if row.get("text_id") == row_id), None)


def _labellings(site: Site, opened: Mapping[str, RunTable], tables: Mapping[str, Rows]) -> list[Labelling]:
    labellings = []
    for name, rows in tables.items():
        for row in rows if opened[name].type == "labels" else ():
            ranking = [(item["label"], item["probability"]) for item in row["top"] or ()]
            path = f"/labels/{path_of(name)}/rows"
            link = site.link(path, style=row["style"], predicted=row["label"])
            labellings.append(Labelling(f"{name}, {row['style']}", ranking, link))
    return labellings


def _links(site: Site, opened: Mapping[str, RunTable], tables: Mapping[str, Rows]) -> list[tuple[str, Markup]]:
    """Its cluster and its group of duplicates."""
    links = []
    for name, rows in tables.items():
        if opened[name].type == "clusters":
            links.append((f"cluster {rows[0]['cluster_id']} of {name}", f"/clusters/{path_of(name)}/{rows[0]['cluster_id']}"))  # fmt: skip
        elif opened[name].type == "duplicates":
            what = "kept of its group" if rows[0]["kept"] else "duplicate in group"
            links.append((f"{what} {rows[0]['group_id']} of {name}", f"/duplicates/{path_of(name)}/{rows[0]['group_id']}"))  # fmt: skip
    return [(title, site.link(path)) for title, path in links]


def _neighbours(run: ServedRun, row_id: str) -> tuple[list[Tile], str]:
    """The nearest rows by the first index that has the row, and its name; none where there is no such index."""
    for table in run.indexes:
        try:
            searcher = run.searcher(table.name).searcher
        except ClipRayError:  # stale or damaged: the search page says so
            continue
        if searcher.row_numbers.number(row_id) is not None:
            return _nearest(run, table, searcher, row_id), table.name
    return [], ""


def _nearest(run: ServedRun, index: RunTable, searcher: Searcher, row_id: str) -> list[Tile]:
    scores, numbers = searcher.search(searcher.vector_of(row_id), NEIGHBOURS, leave_out=[row_id])
    hits = searcher.hits(scores[0], numbers[0])
    named = [{"image_id": hit.image_id, "region_id": hit.region_id, "score": hit.score} for hit in hits]
    return tiles_of_hits(run.tables, index, named)
