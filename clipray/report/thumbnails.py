"""Thumbnails of limited size, or the reason why an image has none."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw

from clipray.inputs.layout import Layout
from clipray.inputs.manifest import read_rows
from clipray.inputs.parquet_files import read_footer
from clipray.job import SCHEMES
from clipray.pipelines.decode import decode
from clipray.pipelines.image_fetch import fetch
from clipray.pipelines.spec import Limits
from clipray.storage.uris import is_local, parse
from clipray.tables.reasons import Rejected

LIMITS = Limits(max_bytes=64 * 2**20, max_pixels=50_000_000, fetch_timeout_s=10.0, schemes=SCHEMES)
QUALITIES = (80, 65, 50, 35)
LEAST_PX = 16
SLOW_S = 2.0
PATIENCE = 6  # images of one place that failed so slowly, one after the other, after which no more are tried
MARK = (234, 88, 12)
BATCH_ROWS = 64


@dataclass(frozen=True)
class ImageSource:
    """Where an image lies.

    Attributes:
        size: width and height in px, as people see it. box: of a region, x1, y1, x2, y2 in px.
        manifests: where its bytes may lie, if it has no `uri`. layout: how these hold their rows.
    """

    image_id: str
    uri: str | None
    size: tuple[int, int]
    manifests: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout)
    box: tuple[float, ...] | None = None


class Thumbnails:
    """Makes thumbnails of at most `side_px` and `most_bytes`. Safe to use in several threads.

    Each result is (WebP, ""), or (None, why there is none).
    """

    def __init__(self, side_px: int, most_bytes: int) -> None:
        self._side_px, self._most_bytes = side_px, most_bytes
        self._slow = Counter[str]()

    def of_uri(self, source: ImageSource) -> tuple[bytes | None, str]:
        place = "" if is_local(str(source.uri)) else "://".join(parse(str(source.uri))).split("/")[2]
        if place and self._slow[place] >= PATIENCE:
            return None, "its storage does not answer"
        began = time.monotonic()
        try:
            data = fetch(str(source.uri), LIMITS)
        except Rejected as rejected:
            self._slow[place] = self._slow[place] + 1 if time.monotonic() - began >= SLOW_S else 0
            return None, _reason(rejected)
        self._slow[place] = 0
        return self.of_bytes(data, source)

    def of_bytes(self, data: bytes, source: ImageSource) -> tuple[bytes | None, str]:
        try:
            return self.webp(data, source), ""
        except Rejected as rejected:
            return None, _reason(rejected)

    def webp(self, data: bytes, source: ImageSource) -> bytes:
        """The thumbnail as WebP. Raises Rejected."""
        image = decode(data, LIMITS, draft_px=2 * self._side_px)
        image.thumbnail((self._side_px, self._side_px), Image.Resampling.LANCZOS)
        if source.box is not None:
            _draw_box(image, source)
        return self._encoded(image)

    def _encoded(self, image: Image.Image) -> bytes:
        """WebP of lower and lower quality, then smaller, until it fits."""
        while True:
            for quality in QUALITIES:
                sink = io.BytesIO()
                image.save(sink, "WEBP", quality=quality)
                if sink.tell() <= self._most_bytes:
                    return sink.getvalue()
            if max(image.size) <= LEAST_PX:
                return sink.getvalue()
            image.thumbnail((max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)))


def data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _reason(rejected: Rejected) -> str:
    if rejected.stage == "fetch" and rejected.reason not in ("scheme_not_allowed", "too_many_bytes", "empty"):
        return "cannot be read"
    return rejected.reason.replace("_", " ")


def _draw_box(image: Image.Image, source: ImageSource) -> None:
    """The region's box on the image, its size known from the table."""
    assert source.box is not None
    scale = [side / max(whole, 1) for side, whole in zip(image.size, source.size, strict=True)] * 2
    left, top, right, bottom = (value * factor for value, factor in zip(source.box, scale, strict=True))
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=MARK, width=2)


def inline_images(sources: Iterable[ImageSource]) -> Iterator[tuple[str, bytes]]:
    """Id and bytes of images that manifests hold inline, read a few rows at a time."""
    wanted: dict[str, set[str]] = {}
    layouts: dict[str, Layout] = {}
    for source in sources:
        for url in source.manifests:
            wanted.setdefault(url, set()).add(source.image_id)
            layouts[url] = source.layout
    for url, names in wanted.items():
        try:
            yield from _inline(url, layouts[url], pa.array(sorted(names), pa.string()))
        except Exception:  # every filesystem has its own errors; without the manifest its images are not known
            continue


def _inline(url: str, layout: Layout, names: pa.Array) -> Iterator[tuple[str, bytes]]:
    file = read_footer(url)
    if not {"image_id", "bytes"} <= set(layout.view(file).schema.names):
        return
    for row_group in file.row_groups:
        ids = (read.table["image_id"] for read in read_rows(row_group, ["image_id"], BATCH_ROWS, layout))
        if not any(pc.any(pc.is_in(part, names)).as_py() for part in ids):
            continue
        for read in read_rows(row_group, ["image_id", "bytes"], BATCH_ROWS, layout):
            for row in read.table.filter(pc.is_in(read.table["image_id"], names)).to_pylist():
                if row["bytes"]:
                    yield row["image_id"], row["bytes"]
