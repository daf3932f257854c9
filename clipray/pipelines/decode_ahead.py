"""Blocks of manifest rows to pictures: fetched and decoded in threads, a bounded number ahead of who takes them."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from clipray.models.load import keeping_aspect, split_transform
from clipray.models.preprocess import RGB_BYTES, Preprocess
from clipray.pipelines.budget import Budget
from clipray.pipelines.decode import DecodedImage, load_picture, prepare_pillow
from clipray.pipelines.decode_memory import DecodeMemory, decode_budget
from clipray.pipelines.image_fetch import Fetcher, NoRoom
from clipray.pipelines.messages import Report, fatal
from clipray.pipelines.spec import EncodeSettings
from clipray.storage.uris import is_local
from clipray.tables.reasons import Rejected

DECODE_NICENESS = 19
REMOTE_THREADS = 32  # waiting for a network, not computing
REMOTE_BYTES = 64 * 2**20  # of files from servers that are not decoded yet
ROOM_BYTES = REMOTE_BYTES // REMOTE_THREADS  # for a file of which nothing is known

Loaded = DecodedImage | Rejected


class PictureLoader:
    """Rows -> pictures, in order, a bounded number ahead of who consumes them."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._limits, keep, most = settings.limits, settings.keep_aspect, settings.limits.max_pixels
        prepare_pillow()
        self._memory = DecodeMemory(decode_budget(most))
        rounded = settings.rounded_draft
        self._preprocess = (
            keeping_aspect(settings.model, *keep, most, rounded=rounded)
            if keep
            else split_transform(settings.model, most, rounded=rounded)[0]
        )
        wanted = keep[0] if keep else max(settings.model.image_size)
        self._draft_px = 2 * wanted if settings.fast_decode else None
        self._decoders = ThreadPoolExecutor(settings.threads, "decode", initializer=_yield_to_the_network)
        self._fetchers = ThreadPoolExecutor(REMOTE_THREADS, "fetch")
        self._fetcher, self._fetched = Fetcher(settings.limits), Budget(REMOTE_BYTES)
        self._room = ROOM_BYTES

    def load(
        self, block: pa.Table, ahead: int, ways: Iterable[Preprocess] | None = None
    ) -> Iterator[DecodedImage | Rejected]:
        """One result per row of `block` (columns `uri` and/or `bytes`), in its order.

        `ways`: how each row's picture is preprocessed, where it is not as usual.
        """
        waiting: deque[Callable[[], Loaded]] = deque()
        sources = zip(_column(block, "uri"), _column(block, "bytes"), strict=True)
        for (uri, data), way in zip(sources, ways or itertools.repeat(self._preprocess)):
            waiting.append(self._submit(uri, data, way))
            if len(waiting) > ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def both(self, change: Callable[[Image.Image], Image.Image]) -> Preprocess:
        """A way to preprocess: (2, H, W, 3), the picture as it was, and as it became: a copy that `change` makes."""

        def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
            return np.stack([self._preprocess(image, height, width), self._preprocess(change(image))])

        def scratch_bytes(height: int, width: int) -> int:
            return RGB_BYTES * height * width + self._preprocess.scratch_bytes(height, width)

        return Preprocess(to_pixels, scratch_bytes)

    def _submit(self, uri: str | None, data: pa.Scalar | None, preprocess: Preprocess) -> Callable[[], Loaded]:
        """Start a row on its way; the result waits for it. A file from a server is fetched in one thread and decoded in another."""
        raw = data.as_py() if data is not None else None
        if raw is None and uri is not None and not is_local(uri):
            fetched = self._fetchers.submit(self._fetch_then_decode, uri, preprocess)
            return lambda: fetched.result().result()
        return self._decoders.submit(self._decode, uri, raw, preprocess).result

    def _decode(self, uri: str | None, raw: bytes | None, preprocess: Preprocess) -> Loaded:
        return load_picture(uri, raw, self._limits, preprocess, self._draft_px, self._memory)

    def _fetch_then_decode(self, uri: str, preprocess: Preprocess) -> Future[Loaded]:
        try:
            raw = self._fetch(uri)
        except Rejected as refused:
            done: Future[Loaded] = Future()
            done.set_result(refused)
            return done
        return self._decoders.submit(self._decode_fetched, raw, preprocess)

    def _decode_fetched(self, raw: bytes, preprocess: Preprocess) -> Loaded:
        try:
            return self._decode(None, raw, preprocess)
        finally:
            self._fetched.give(len(raw))

    def _fetch(self, uri: str) -> bytes:
        """A file's bytes, whose number is taken from the budget. A thread that waits for more of it holds none."""
        room = self._room
        while True:
            self._fetched.take(room)
            held = 0
            try:
                raw = self._fetcher.fetch(uri, room)
                self._room, held = max(ROOM_BYTES, len(raw)), len(raw)  # the next file is likely as large
                return raw
            except NoRoom as larger:
                needed = larger.size
            finally:
                self._fetched.give(room - held)
            room = needed


def _yield_to_the_network() -> None:
    """Decode in the gaps that the network leaves: its threads wait for one another, so to slow one is to slow all."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DECODE_NICENESS)


def _column(block: pa.Table, name: str) -> Iterator[Any]:
    if name not in block.column_names:
        return iter([None] * len(block))
    return iter(block[name].to_pylist()) if name == "uri" else (scalar for scalar in block[name])


class DecodeBlocks:
    """Manifest rows -> the same rows with `pixels`, for encoders elsewhere; runs in CPU tasks."""

    def __init__(self, settings: EncodeSettings, report: Report) -> None:
        self.settings, self.report = settings, report
        self._loader: PictureLoader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "report": self.report, "_loader": None}

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._decode(block)

    def _decode(self, block: pa.Table) -> pa.Table:
        self._loader = self._loader or PictureLoader(self.settings)
        start = time.perf_counter()
        loaded = list(self._loader.load(block, max(REMOTE_THREADS, 2 * self.settings.threads)))
        self.report({"stage": "decode", "rows": len(block), "seconds": time.perf_counter() - start})
        good = [p if isinstance(p, DecodedImage) else None for p in loaded]
        columns = {
            "pixels": pa.array([p and p.pixels.tobytes() for p in good], pa.binary()),
            "height": pa.array([p and p.height for p in good], pa.int32()),
            "width": pa.array([p and p.width for p in good], pa.int32()),
            **refusal_columns(loaded),
        }
        kept = block.drop_columns(["bytes"]) if "bytes" in block.column_names else block
        return pa.table({**dict(zip(kept.column_names, kept.columns, strict=True)), **columns})


def refusal_columns(results: Iterable[Any]) -> dict[str, pa.Array]:
    refused = [r if isinstance(r, Rejected) else None for r in results]
    return {
        name: pa.array([r and getattr(r, name) for r in refused], pa.string())
        for name in ("stage", "reason", "message")
    }
