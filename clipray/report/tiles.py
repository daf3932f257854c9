"""Tiles: rows on the page, as thumbnails or texts. Sections collect them; the album loads all at once."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from clipray.inputs.layout import Layout
from clipray.report.run_tables import RunTables
from clipray.report.thumbnails import ImageSource, Thumbnails, inline_images

TOTAL_BYTES = 1_100_000  # of all images of a page, before base64
LARGEST_BYTES = 12_000  # of one of them
THREADS = 4


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
        sources = self._sources(run, with_image)
        thumbnails = Thumbnails(self._side_px, min(LARGEST_BYTES, TOTAL_BYTES // max(len(with_image), 1)))
        inline = {key: source for key, source in sources.items() if source.manifests}
        thumbnails_of: dict[tuple[str, str], tuple[str | None, str]] = {}
        for image_id, data in inline_images(inline.values()):
            for key in (key for key in inline if key[0] == image_id):
                thumbnails_of[key] = thumbnails.of_bytes(data, inline[key])
        placed = {key: source for key, source in sources.items() if source.uri}
        with ThreadPoolExecutor(THREADS) as pool:
            thumbnails_of |= zip(placed, pool.map(thumbnails.of_uri, placed.values()), strict=True)
        for tile in with_image:
            tile.image, tile.missing = thumbnails_of.get(_key(tile), (None, "no image is known"))

    def _read_texts(self, run: RunTables) -> None:
        """The words of rows that may be texts."""
        maybe = [tile for tile in self.tiles if not {"image_id", "region_id"} & tile.ids.keys()]
        names = {tile.name for tile in maybe}
        rows = (row for table in run.known("texts") for row in table.where("text_id", names, "text_id", "text"))
        texts = {row["text_id"]: row["text"] for row in rows}
        for tile in maybe:
            tile.text = texts.get(tile.name)

    def _sources(self, run: RunTables, tiles: list[Tile]) -> dict[tuple[str, str], ImageSource]:
        """Where the images lie that a table knows, by image and region; and what they are known to show."""
        sources: dict[str, ImageSource] = {}
        known: dict[str, str] = {}
        for table in run.known("images"):
            labelled = [run.label] if run.has_label(table) else []
            columns = ("image_id", "uri", "height", "width", *labelled)
            layout = Layout.of_facts(table.record.inputs.get("layout", {}))
            for row in table.where("image_id", {tile.image_id for tile in tiles}, *columns):
                manifests = () if row["uri"] else tuple(map(str, table.record.inputs.get("manifest", ())))
                size = row["width"], row["height"]
                sources[row["image_id"]] = ImageSource(row["image_id"], row["uri"], size, manifests, layout)
                if labelled and row[run.label] is not None:
                    known[row["image_id"]] = str(row[run.label])
        for tile in tiles:
            tile.known = known.get(tile.image_id)
        boxes, keys = self._boxes(run, tiles), dict.fromkeys(map(_key, tiles))
        return {key: replace(sources[key[0]], box=boxes.get(key[1])) for key in keys if key[0] in sources}

    def _boxes(self, run: RunTables, tiles: list[Tile]) -> dict[str, tuple[float, ...]]:
        wanted = {tile.ids["region_id"] for tile in tiles if "region_id" in tile.ids}
        return {
            row["region_id"]: tuple(row["box_xyxy"])
            for table in run.known("regions")
            for row in table.where("region_id", wanted, "region_id", "box_xyxy")
        }


def _key(tile: Tile) -> tuple[str, str]:
    return tile.image_id, tile.ids.get("region_id", "")
