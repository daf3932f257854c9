"""Blocks of manifest rows to blocks of vectors: decoding in threads, the network in others."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipray.models.geometry import Geometry, geometry, keep_aspect_geometry, keep_aspect_size
from clipray.models.image_encoder import ImageEncoder
from clipray.pipelines.block_encoder import start_encoder
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.decode_ahead import PictureLoader, refusal_columns
from clipray.pipelines.messages import Report, fatal, worker_facts
from clipray.pipelines.region_boxes import PictureRegions, picture_regions, region_columns, sort_boxes
from clipray.pipelines.spec import EncodeSettings
from clipray.tables import fits
from clipray.tables.reasons import Rejected

SIZES_AT_ONCE = 4  # batches that are gathered before pictures are grouped by size


@dataclass(frozen=True)
class Row:
    """An encoded picture: its size in px, a vector by feature, its regions where a feature has them."""

    height: int
    width: int
    vectors: dict[str, np.ndarray]
    regions: PictureRegions | None


class EncodeBlocks:
    """Manifest rows (or rows with `pixels`) -> rows of the table, with `stage`, `reason`, `message` where one failed.

    Several blocks may be under way at once: while one is being encoded, the next is being decoded.
    """

    def __init__(self, settings: EncodeSettings, report: Report) -> None:
        with fatal(report):
            self._start(settings, report)

    def _start(self, settings: EncodeSettings, report: Report) -> None:
        self.settings, self.report = settings, report
        self._networks, self._encoder = start_encoder(ImageEncoder, settings, features=settings.features)
        self._boxes = (
            any(f.regions in (True, "boxes") for f in settings.features.values()) and "boxes" in settings.schema.names
        )
        self._loader = PictureLoader(settings)
        self._turn = threading.Lock()  # blocks end one after another, not all at the same late moment
        self.report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._encode_block(block)

    def _encode_block(self, block: pa.Table) -> pa.Table:
        batch_size = self._encoder.batch_size
        ahead = (1 + self.settings.at_once) * batch_size
        pictures = self._unpacked(block) if "pixels" in block.column_names else self._loader.load(block, ahead)
        boxes = block["boxes"].to_pylist() if self._boxes else itertools.repeat(None)
        work = zip(pictures, boxes, strict=False)
        # Pictures of many sizes are encoded size by size: the more at once, the fuller the batches.
        chunk_size = batch_size * (SIZES_AT_ONCE if self.settings.keep_aspect else 1)
        waiting: deque[Future[list[Row | Rejected]]] = deque()
        rows: list[Row | Rejected] = []
        chunk = list(itertools.islice(work, chunk_size))
        with self._turn:
            while chunk:
                waiting.append(self._networks.submit(self._encode, chunk))
                if len(waiting) > self.settings.at_once:
                    rows += waiting.popleft().result()
                chunk = list(itertools.islice(work, chunk_size))
        for future in waiting:
            rows += future.result()
        return result_table(block, rows, self.settings)

    def _unpacked(self, block: pa.Table) -> Iterator[DecodedImage | Rejected]:
        names = ("pixels", "height", "width", "stage", "reason", "message")
        for pixels, height, width, stage, reason, message in zip(*(block[n] for n in names), strict=True):
            if reason.is_valid:
                yield Rejected(stage.as_py(), reason.as_py(), message.as_py())
                continue
            shape = self._input_size(height.as_py(), width.as_py())
            yield DecodedImage(
                np.frombuffer(pixels.as_buffer(), np.uint8).reshape(*shape, 3), height.as_py(), width.as_py()
            )

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        keep = self.settings.keep_aspect
        return keep_aspect_size(height, width, *keep) if keep else self.settings.model.image_size

    def _geometry(self, picture: DecodedImage) -> Geometry:
        keep = self.settings.keep_aspect
        if keep:
            return keep_aspect_geometry(picture.height, picture.width, *keep)
        return geometry(picture.height, picture.width, self.settings.model.preprocess)

    def _encode(self, chunk: list[tuple[DecodedImage | Rejected, Any]]) -> list[Row | Rejected]:
        """One result per picture; a picture that the network cannot take is refused alone."""
        start = time.perf_counter()
        result: list[Any] = [picture for picture, _ in chunk]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for n, (picture, _) in enumerate(chunk):
            if isinstance(picture, DecodedImage):
                sizes.setdefault(picture.pixels.shape, []).append(n)
        for places in sizes.values():
            encoded = self._try([(chunk[n][0], chunk[n][1]) for n in places])
            for n, row in zip(places, encoded, strict=True):
                result[n] = row
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        return result

    def _try(self, work: list[tuple[Any, Any]]) -> list[Row | Rejected]:
        """`work`: pictures of one size, and their boxes."""
        try:
            return self._rows(work)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(work) > 1:
                return [result for one in work for result in self._try([one])]
            return [Rejected("encode", "encode_failed", f"{type(error).__name__}: {error}")]

    def _rows(self, work: list[tuple[DecodedImage, Any]]) -> list[Row | Rejected]:
        regional = self.settings.region_schema is not None
        places = [self._geometry(picture) for picture, _ in work] if regional else []
        given = (
            [sort_boxes(boxes, place) for (_, boxes), place in zip(work, places, strict=True)] if self._boxes else []
        )
        made = self._encoder.encode(
            np.stack([picture.pixels for picture, _ in work]), [boxes.on_input for boxes in given] or None
        )
        starts = np.cumsum([0, *(len(boxes.number) for boxes in given)])
        rows: list[Row | Rejected] = []
        for n, (picture, _) in enumerate(work):
            vectors = {name: matrix[n] for name, matrix in made.vectors.items()}
            regions = None
            if regional:
                assert made.cells is not None
                assert made.covered_px is not None
                regions = picture_regions(
                    places[n],
                    made.cells,
                    made.covered_px,
                    made.grid,
                    None if made.regions is None else made.regions[n],
                    given[n] if given else None,
                    None if made.boxes is None else made.boxes[starts[n] : starts[n + 1]],
                )
            rows.append(
                Row(picture.height, picture.width, vectors, regions)
                if self._fit(vectors, regions)
                else Rejected("encode", "encode_failed", "the vector is not finite, or too large for its column")
            )
        return rows

    def _fit(self, vectors: dict[str, np.ndarray], regions: PictureRegions | None) -> bool:
        kinds = {name: self.settings.schema.field(name).type for name in vectors}
        of_an_image = all(fits(x, kinds[name]) for name, x in vectors.items())
        return of_an_image and (regions is None or fits(regions.vectors, next(iter(kinds.values()))))


def result_table(block: pa.Table, rows: list[Row | Rejected], settings: EncodeSettings) -> pa.Table:
    """The table's columns for every row, null where the row was refused, the refusals' columns, and nested regions."""
    columns: dict[str, pa.Array] = {}
    nested = {}
    if settings.region_schema is not None:
        regions = [row.regions if isinstance(row, Row) else None for row in rows]
        nested = region_columns(block["image_id"].to_pylist(), regions, settings.region_schema)
    for field in settings.schema:
        if field.name in settings.features:
            columns[field.name] = _vector_column(rows, field)
        elif field.name in ("height", "width"):
            sizes = [getattr(row, field.name) if isinstance(row, Row) else None for row in rows]
            columns[field.name] = pa.array(sizes, pa.int32())
        elif field.name in nested:
            columns[field.name] = nested.pop(field.name)
        elif field.name in block.column_names:
            columns[field.name] = block[field.name].combine_chunks().cast(field.type)
        else:
            columns[field.name] = pa.nulls(len(block), field.type)  # `uri` of a manifest of bytes
    return pa.table({**columns, **nested, **refusal_columns(rows)})


def _vector_column(rows: list[Row | Rejected], field: pa.Field) -> pa.Array:
    """n results -> fixed_size_list column of n rows, null where refused."""
    refused = np.array([isinstance(row, Rejected) for row in rows], bool)
    matrix = np.zeros((len(rows), field.type.list_size), field.type.value_type.to_pandas_dtype())
    for n, row in enumerate(rows):
        if isinstance(row, Row):
            matrix[n] = row.vectors[field.name]
    return pa.FixedSizeListArray.from_arrays(
        pa.array(matrix.ravel(), field.type.value_type), type=field.type, mask=pa.array(refused)
    )
