"""Tiles: rows on the page, as thumbnails or texts. Sections collect them; the album loads all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clipray.report.image_sources import Key, image_sources, thumbnails_of
from clipray.report.run_tables import RunTables
from clipray.report.thumbnails import Thumbnails, data_uri

TOTAL_BYTES = 1_100_000  # of all images of a page, before base64
LARGEST_BYTES = 12_000  # of one of them


@dataclass(eq=False)
class Tile:
    """A row as it is shown.

    Attributes:
        ids: columns that name it, the last of which is its own name.
        note: what stands below it. mark: `hit`, `miss`, `junk`, `query` or "".
        predicted: the label that it was given, held against `known`.
        known, text, image, missing: filled in by `Album.load`: what it is known to show; of a text, its words; the
            image as a data URI; or why there is none.
    """

    ids: Mapping[str, str]
    note: str = ""
    mark: str = ""
    predicted: str | None = None
    known: str | None = None
    text: str | None = None
    image: str | None = None
    missing: str = ""

    @property
    def name(self) -> str:
        return list(self.ids.values())[-1]

    @property
    def image_id(self) -> str:
        if "region_id" in self.ids:
            return self.ids.get("image_id") or self.ids["region_id"].rpartition("#")[0]
        return self.ids.get("image_id", self.name)

    @property
    def key(self) -> Key:
        return self.image_id, self.ids.get("region_id", "")

    @property
    def verdict(self) -> str:
        """Whether the given label is the known one."""
        if self.predicted is None or self.known is None:
            return ""
        return "right" if self.predicted == self.known else "wrong"


class Album:
    """All tiles of a page."""

    def __init__(self, thumbnail_px: int) -> None:
        self.tiles: list[Tile] = []
        self._side_px = thumbnail_px

    def tile(self, ids: Mapping[str, str], note: str = "", mark: str = "", predicted: str | None = None) -> Tile:
        self.tiles.append(Tile(ids, note, mark, predicted))
        return self.tiles[-1]

    def load(self, run: RunTables) -> None:
        """Fill in the tiles: one pass over each table that knows their rows, and each image once.

        Images share TOTAL_BYTES, so a page has room for any number of them. Whatever cannot be had says why.
        """
        self._read_texts(run)
        with_image = [tile for tile in self.tiles if tile.text is None]
        sources, labels = image_sources(run, [tile.key for tile in with_image])
        thumbnails = Thumbnails(self._side_px, min(LARGEST_BYTES, TOTAL_BYTES // max(len(with_image), 1)))
        webp = thumbnails_of(sources, thumbnails)
        for tile in with_image:
            data, tile.missing = webp.get(tile.key, (None, "no image is known"))
            tile.image, tile.known = data_uri(data) if data else None, labels.get(tile.image_id)

    def _read_texts(self, run: RunTables) -> None:
        """The words of rows that may be texts."""
        maybe = [tile for tile in self.tiles if not {"image_id", "region_id"} & tile.ids.keys()]
        names = {tile.name for tile in maybe}
        rows = (row for table in run.known("texts") for row in table.where("text_id", names, "text_id", "text"))
        texts = {row["text_id"]: row["text"] for row in rows}
        for tile in maybe:
            tile.text = texts.get(tile.name)
