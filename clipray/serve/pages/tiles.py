"""Rows as tiles of a grid: an image, a region of one, or a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clipray.report.run_tables import RunTable, RunTables

OF_HIT = ("image_id", "region_id", "box_xyxy", "score", "rank")
MOST_FACTS = 4


@dataclass(frozen=True)
class Tile:
    """A row as it is shown.

    Attributes:
        row_id: its own name. image_id: of the image, "" of a text or as long as that is not known. region_id: of a region whose box is drawn.
        text: the words, of a text.
        note: a figure under it, such as a score. mark: a word for what it is, such as `kept`.
        facts: names and values of columns.
    """

    row_id: str
    image_id: str
    region_id: str = ""
    text: str | None = None
    note: str = ""
    mark: str = ""
    facts: tuple[tuple[str, Any], ...] = ()


def tile_of(ids: Mapping[str, Any], note: str = "", mark: str = "") -> Tile:
    """A row by its identity columns."""
    row_id = str(list(ids.values())[-1])
    region_id = str(ids.get("region_id") or "")
    image_id = str(ids.get("image_id") or region_id.rpartition("#")[0])
    return Tile(row_id, image_id, region_id, note=note, mark=mark)


def tiles_of_hits(run: RunTables, index: RunTable, hits: Iterable[Mapping[str, Any]]) -> list[Tile]:
    """Tiles of the answers of a search of an index."""
    columns = [name for name in ("image_id", "region_id") if name in index.record.columns]
    return with_texts(run, [_tile_of_hit(columns, hit) for hit in hits])


def with_texts(run: RunTables, tiles: Sequence[Tile]) -> list[Tile]:
    """The tiles, of which those of texts get their words. A row that is neither of an image nor a text may be an image."""
    names = {tile.row_id for tile in tiles if not tile.image_id}
    rows = (
        [row for table in run.known("texts") for row in table.where("text_id", names, "text_id", "text")]
        if names
        else []
    )
    texts = {row["text_id"]: row["text"] for row in rows}
    return [
        tile if tile.image_id
        else replace(tile, text=texts[tile.row_id]) if tile.row_id in texts
        else replace(tile, image_id=tile.row_id)
        for tile in tiles
    ]  # fmt: skip


def _tile_of_hit(columns: Sequence[str], hit: Mapping[str, Any]) -> Tile:
    ids = {name: hit[name] for name in columns} or {"": hit["image_id"]}
    facts = [(name, value) for name, value in hit.items() if name not in OF_HIT and value is not None]
    score = hit["score"]
    note = "" if score is None or not math.isfinite(score) else f"{score:.3f}"
    return replace(tile_of(ids, note), facts=tuple(facts[:MOST_FACTS]))
