"""Manifest rows to images: fetched and decoded in threads, a bounded number ahead of the consumer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from clipray.models.geometry import scale_target
from clipray.models.preprocess import RGB_BYTES, Preprocess, preprocess_of
from clipray.pipelines.block_encoder import rejection_columns
from clipray.pipelines.decode import DecodedImage, load_image, prepare_pillow
from clipray.pipelines.decode_memory import ByteBudget, DecodeMemory, decode_budget
from clipray.pipelines.image_fetch import Fetcher, NoRoom
from clipray.pipelines.merged_ranges import PIECE_BYTES, Piece, merge_ranges
from clipray.pipelines.per_host_pool import PerHostPool
from clipray.pipelines.retries import Retries
from clipray.pipelines.spec import ImageSpec, Report
from clipray.storage.uris import http_host, is_local
from clipray.tables.reasons import Rejected

DECODE_NICENESS = 19
REMOTE_THREADS = 32  # waiting for a network, not computing
REMOTE_BYTES = 64 * 2**20  # of files from servers that are not decoded yet
ROOM_BYTES = REMOTE_BYTES // REMOTE_THREADS  # for a file of which nothing is known

Loaded = DecodedImage | Rejected
Row = tuple[tuple[str | None, pa.Scalar | None], Preprocess, Rejected | None]
"""The URI and the bytes, how the image is preprocessed, and why it is rejected already."""
Result = TypeVar("Result")


class ImageLoader:
    """Rows -> images, in order, a bounded number ahead of the consumer."""

    def __init__(self, spec: ImageSpec) -> None:
        keep, max_pixels, rounded = spec.keep_aspect, spec.limits.max_pixels, spec.rounded_draft
        prepare_pillow()
        self._limits, self._memory = spec.limits, DecodeMemory(decode_budget(max_pixels))
        self._preprocess = preprocess_of(spec.model, max_pixels, keep_aspect=keep, rounded=rounded)
        longest = keep[0] if keep else max(scale_target(spec.model.preprocess))
        self._draft_px = 2 * longest if spec.fast_decode else None
        self._decoders = ThreadPoolExecutor(spec.threads, "decode", initializer=_yield_to_the_network)
        self._fetchers = PerHostPool(REMOTE_THREADS, "fetch", spec.limits.connections_per_host)
        retries = Retries()
        self._fetcher, self._fetched = Fetcher(spec.limits, retries), ByteBudget(REMOTE_BYTES)
        self._piece_fetcher = Fetcher(replace(spec.limits, max_bytes=PIECE_BYTES), retries)
        self._room = ROOM_BYTES

    def load(
        self,
        block: pa.Table,
        ahead: int,
        ways: Iterable[Preprocess] | None = None,
        rejected: Iterable[Rejected | None] | None = None,
    ) -> Iterator[Loaded]:
        """One result per row of `block` (columns `uri` and/or `bytes`), in its order.

        Args:
            ways: how each row's image is preprocessed, where it is not as usual.
            rejected: for each row why it is rejected already, and not to be loaded; or None.
        """
        rows = zip(sources(block), ways or repeat(self._preprocess), rejected or repeat(None))
        return in_order(self._submit_all(list(rows)), ahead)

    def both(self, change: Callable[[Image.Image], Image.Image]) -> Preprocess:
        """A way to preprocess: (2, H, W, 3), the image as it was, and as it became: a copy that `change` makes."""

        def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
            return np.stack([self._preprocess(image, height, width), self._preprocess(change(image))])

        def scratch_bytes(height: int, width: int) -> int:
            return RGB_BYTES * height * width + self._preprocess.scratch_bytes(height, width)

        return Preprocess(to_pixels, scratch_bytes)

    def _submit_all(self, rows: Sequence[Row]) -> Iterator[Callable[[], Loaded]]:
        """Start to load each row as it is drawn, and with it those whose bytes are its neighbours on a server."""
        fetched = [None if no or (data is not None and data.is_valid) else uri for (uri, data), _, no in rows]
        pieces = {row: piece for piece in merge_ranges(fetched, self._limits.max_bytes) for row in piece.parts}
        loading: dict[int, Callable[[], Loaded]] = {}
        for number, ((uri, data), way, no) in enumerate(rows):
            if number in pieces and number not in loading:
                loading |= self._submit_piece(pieces[number], rows)
            yield loading.pop(number) if number in pieces else self._submit(uri, data, way, no)

    def _submit_piece(self, piece: Piece, rows: Sequence[Row]) -> dict[int, Callable[[], Loaded]]:
        """Start to load the rows of a piece: one request for all of them."""
        uris_and_ways = {row: (str(rows[row][0][0]), rows[row][1]) for row in piece.parts}
        fetched = self._fetchers.submit(http_host(piece.uri), self._fetch_piece, piece, uris_and_ways)
        return {row: partial(_decoded_part, fetched, row) for row in piece.parts}

    def _fetch_piece(self, piece: Piece, rows: dict[int, tuple[str, Preprocess]]) -> dict[int, Callable[[], Loaded]]:
        """Start to decode each row. Where the one request fails, each row is asked for alone, and has its own reason."""
        self._fetched.acquire(piece.size)
        held = 0
        try:
            data = self._piece_fetcher.fetch(piece.uri)
            parts = {row: data[part] for row, part in piece.parts.items()}
            held = sum(map(len, parts.values()))
        except Rejected:
            return {row: self._submit_alone(uri, preprocess) for row, (uri, preprocess) in rows.items()}
        finally:
            self._fetched.release(piece.size - held)
        return {
            row: self._decoders.submit(self._decode_fetched, raw, rows[row][1]).result for row, raw in parts.items()
        }

    def _submit(
        self, uri: str | None, data: pa.Scalar | None, preprocess: Preprocess, rejected: Rejected | None
    ) -> Callable[[], Loaded]:
        """Start to load a row; the result waits for it. A file from a server is fetched in one thread and decoded in another."""
        if rejected is not None:
            return lambda: rejected
        raw = data.as_py() if data is not None else None
        if raw is None and uri is not None and not is_local(uri):
            return self._submit_alone(uri, preprocess)
        return self._decoders.submit(self._decode, uri, raw, preprocess).result

    def _submit_alone(self, uri: str, preprocess: Preprocess) -> Callable[[], Loaded]:
        """Start to load a file from a server, or a part of one."""
        fetched = self._fetchers.submit(http_host(uri), self._fetch_then_decode, uri, preprocess)
        return partial(_decoded, fetched)

    def _decode(self, uri: str | None, raw: bytes | None, preprocess: Preprocess) -> Loaded:
        return load_image(uri, raw, self._limits, preprocess, self._draft_px, self._memory)

    def _fetch_then_decode(self, uri: str, preprocess: Preprocess) -> Future[Loaded]:
        return self._decoders.submit(self._decode_fetched, self._fetch(uri), preprocess)

    def _decode_fetched(self, raw: bytes, preprocess: Preprocess) -> Loaded:
        try:
            return self._decode(None, raw, preprocess)
        finally:
            self._fetched.release(len(raw))

    def _fetch(self, uri: str) -> bytes:
        """A file's bytes, whose number is taken from the budget. A thread that waits for more of it holds none."""
        room = self._room
        while True:
            self._fetched.acquire(room)
            held = 0
            try:
                raw = self._fetcher.fetch(uri, room)
                self._room, held = max(ROOM_BYTES, len(raw)), len(raw)  # the next file is likely as large
                return raw
            except NoRoom as larger:
                needed = larger.size
            finally:
                self._fetched.release(room - held)
            room = needed


def _decoded_part(fetched: Future[dict[int, Callable[[], Loaded]]], row: int) -> Loaded:
    """Wait for the piece that a row's bytes are in, then for its image."""
    return fetched.result()[row]()


def _decoded(fetched: Future[Future[Loaded]]) -> Loaded:
    """Wait for a file's bytes, then for its image."""
    try:
        return fetched.result().result()
    except Rejected as rejected:
        return rejected


def _yield_to_the_network() -> None:
    """Decode in the gaps that the network leaves: its threads wait for one another, so to slow one is to slow all."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DECODE_NICENESS)


def in_order(submitted: Iterable[Callable[[], Result]], ahead: int) -> Iterator[Result]:
    """The results of work that is submitted while the iterable is drawn, at most `ahead` items before they are taken."""
    waiting: deque[Callable[[], Result]] = deque()
    for result in submitted:
        waiting.append(result)
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def sources(block: pa.Table) -> Iterator[tuple[str | None, pa.Scalar | None]]:
    """The URI and the bytes of each row; None where the block has no such column."""
    nothing = [None] * len(block)
    uris = block["uri"].to_pylist() if "uri" in block.column_names else nothing
    return zip(uris, block["bytes"] if "bytes" in block.column_names else nothing, strict=True)


class BlockDecoder:
    """Manifest rows -> the same rows with `pixels`, for encoders elsewhere; runs in CPU tasks."""

    def __init__(self, spec: ImageSpec, report: Report) -> None:
        self._loader, self._report = ImageLoader(spec), report
        self._ahead = max(REMOTE_THREADS, 2 * spec.threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        loaded = list(self._loader.load(block, self._ahead))
        self._report({"stage": "decode", "rows": len(block), "seconds": time.perf_counter() - start})
        images = [image if isinstance(image, DecodedImage) else None for image in loaded]
        columns = {
            "pixels": pa.array([image and image.pixels.tobytes() for image in images], pa.binary()),
            "height": pa.array([image and image.height for image in images], pa.int32()),
            "width": pa.array([image and image.width for image in images], pa.int32()),
            **rejection_columns(loaded),
        }
        kept = block.drop_columns(["bytes"]) if "bytes" in block.column_names else block
        return pa.table({**dict(zip(kept.column_names, kept.columns, strict=True)), **columns})


def unpacked(block: pa.Table, spec: ImageSpec) -> Iterator[Loaded]:
    """What `BlockDecoder` has loaded, from the rows that it wrote."""
    names = ("pixels", "height", "width", "stage", "reason", "message")
    for pixels, *rest in zip(*(block[name] for name in names), strict=True):
        height, width, stage, reason, message = (scalar.as_py() for scalar in rest)
        if reason is not None:
            yield Rejected(stage, reason, message)
            continue
        place = spec.geometry(height, width)
        shape = place.input_height, place.input_width, 3
        yield DecodedImage(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape), height, width)
