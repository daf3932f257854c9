"""Blocks of point clouds to blocks of vectors: rendered in threads, the network in others."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import ImageColor

from clipray.analysis.depth_maps import EMPTY, depth_maps, painted, view_weights
from clipray.analysis.normalize import l2_normalize
from clipray.job import VECTOR
from clipray.models.bumps import boxes_of_masks
from clipray.models.foveal_encoder import FovealEncoder
from clipray.models.image_encoder import ImageEncoder
from clipray.pipelines.block_encoder import start_encoder
from clipray.pipelines.cloud_reader import read_cloud
from clipray.pipelines.decode_ahead import refusal_columns
from clipray.pipelines.image_fetch import Fetcher, checked_bytes
from clipray.pipelines.messages import Report, fatal, worker_facts
from clipray.pipelines.spec import CloudSettings
from clipray.tables import vector_array
from clipray.tables.reasons import Rejected

VIEWS = 6


@dataclass(frozen=True)
class Rendered:
    """A cloud's pictures (6, h, w, 3) uint8, the boxes of their foregrounds (6, 4) xyxy px, the views' weights (6,)."""

    points: int
    pixels: np.ndarray
    boxes: np.ndarray
    weights: np.ndarray


class CloudBlocks:
    """Manifest rows -> rows of `clouds`, with `stage`, `reason`, `message` where one failed."""

    def __init__(self, settings: CloudSettings, report: Report) -> None:
        with fatal(report):
            self.settings, self.report, self.how = settings, report, settings.how
            foveal = self.how.prompt == "foveal"
            make: Callable[..., ImageEncoder] = (
                partial(FovealEncoder, foveal=self.how.foveal) if foveal else ImageEncoder
            )
            self._networks, self._encoder = start_encoder(make, settings)
            colours = (self.how.near, self.how.far, self.how.ground)
            self._colours = [np.array(ImageColor.getrgb(colour)[:3]) for colour in colours]
            self._fetcher = Fetcher(settings.limits)
            self._readers = ThreadPoolExecutor(settings.threads, "render")
            report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            size = max(1, self._encoder.batch_size // VIEWS)
            clouds = self._load(block, 2 * size)
            waiting = []
            while chunk := list(itertools.islice(clouds, size)):
                waiting.append(self._networks.submit(self._encode, chunk))
            return self._table(block, [row for future in waiting for row in future.result()])

    def _load(self, block: pa.Table, ahead: int) -> Iterator[Rendered | Rejected]:
        waiting: deque[Future[Rendered | Rejected]] = deque()
        empty = [None] * len(block)
        uris, data = (block[name].to_pylist() if name in block.column_names else empty for name in ("uri", "bytes"))
        for uri, raw in zip(uris, data, strict=True):
            waiting.append(self._readers.submit(self._render, uri, raw))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _render(self, uri: str | None, data: bytes | None) -> Rendered | Rejected:
        limits = self.settings.limits
        try:
            if data is None and not uri:
                raise Rejected("manifest", "no_source", "neither `uri` nor `bytes`")
            raw = checked_bytes(data, limits) if data is not None else self._fetcher.fetch(str(uri))
            points = read_cloud(raw, self.how.sampled)
            maps = depth_maps(points, self.settings.model.image_size[0], self.how.size, self.how.radius)
            boxes = boxes_of_masks(torch.from_numpy(maps != EMPTY)).numpy()
            return Rendered(len(points), painted(maps, *self._colours), boxes, view_weights(maps, self.how.weights))
        except Rejected as refused:
            return refused

    def _encode(self, chunk: list[Rendered | Rejected]) -> list[tuple[int, np.ndarray] | Rejected]:
        start = time.perf_counter()
        good = [cloud for cloud in chunk if isinstance(cloud, Rendered)]
        found = iter(self._vectors(good))
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        return [next(found) if isinstance(cloud, Rendered) else cloud for cloud in chunk]

    def _vectors(self, clouds: list[Rendered]) -> list[tuple[int, np.ndarray] | Rejected]:
        """Of each cloud its number of points and the weighted sum of its views' unit vectors, a unit vector again."""
        if not clouds:
            return []
        pixels = np.concatenate([cloud.pixels for cloud in clouds])
        if isinstance(self._encoder, FovealEncoder):
            views = self._encoder.encode(pixels, [box[None] for cloud in clouds for box in cloud.boxes]).boxes
        else:
            views = self._encoder.encode(pixels).vectors[VECTOR]
        assert views is not None
        weights = np.stack([cloud.weights for cloud in clouds])
        x = l2_normalize((views.reshape(len(clouds), VIEWS, -1) * weights[:, :, None]).sum(axis=1))
        return [
            (cloud.points, vector)
            if np.isfinite(vector).all()
            else Rejected("encode", "encode_failed", "the vector is not finite")
            for cloud, vector in zip(clouds, x, strict=True)
        ]

    def _table(self, block: pa.Table, rows: list[tuple[int, np.ndarray] | Rejected]) -> pa.Table:
        schema, width = self.settings.schema, self.settings.model.embed_dim
        matrix = np.stack([np.zeros(width, np.float32) if isinstance(row, Rejected) else row[1] for row in rows])
        made = {
            "points": pa.array([None if isinstance(row, Rejected) else row[0] for row in rows], pa.int32()),
            VECTOR: vector_array(matrix, schema.field(VECTOR).type),
        }
        columns = {
            field.name: made[field.name]
            if field.name in made
            else block[field.name].cast(field.type)
            if field.name in block.column_names
            else pa.nulls(len(block), field.type)
            for field in schema
        }
        return pa.table({**columns, **refusal_columns(rows)})
