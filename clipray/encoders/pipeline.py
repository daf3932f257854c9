"""Blocks of manifest rows to blocks of vectors: decoding in threads, the network on one thread of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipray.encoders.encode_settings import EncodeSettings
from clipray.encoders.image_encoder import ImageEncoder
from clipray.encoders.images import Picture, Refused, load_picture, prepare_pillow
from clipray.encoders.models import split_transform
from clipray.reports import Report, fatal

DECODE_NICENESS = 19
REMOTE_THREADS = 32  # waiting for a network, not computing


class PictureLoader:
    """Rows -> pictures, in order, a bounded number ahead of who consumes them."""

    def __init__(self, settings: EncodeSettings) -> None:
        prepare_pillow()
        self._limits = settings.limits
        self._preprocess, _, _ = split_transform(settings.model)
        self._draft_px = 2 * max(settings.model.image_size) if settings.fast_decode else None
        self._decoders = ThreadPoolExecutor(settings.threads, "decode", initializer=_yield_to_the_network)
        self._fetchers = ThreadPoolExecutor(REMOTE_THREADS, "fetch")

    def load(self, block: pa.Table, ahead: int) -> Iterator[Picture | Refused]:
        """One result per row of `block` (columns `uri` and/or `bytes`), in its order."""
        waiting: deque[Future[Picture | Refused]] = deque()
        for uri, data in zip(_column(block, "uri"), _column(block, "bytes"), strict=True):
            waiting.append(self._submit(uri, data))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _submit(self, uri: str | None, data: pa.Scalar | None) -> Future[Picture | Refused]:
        raw = data.as_py() if data is not None else None
        remote = raw is None and uri is not None and "://" in uri and not uri.startswith("file://")
        pool = self._fetchers if remote else self._decoders
        return pool.submit(load_picture, uri, raw, self._limits, self._preprocess, self._draft_px)


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
        loaded = list(self._loader.load(block, 2 * self.settings.threads))
        self.report({"stage": "decode", "rows": len(block), "seconds": time.perf_counter() - start})
        good = [p if isinstance(p, Picture) else None for p in loaded]
        columns = {
            "pixels": pa.array([p and p.pixels.tobytes() for p in good], pa.binary()),
            "height": pa.array([p and p.height for p in good], pa.int32()),
            "width": pa.array([p and p.width for p in good], pa.int32()),
            **_refusal_columns(loaded),
        }
        kept = block.drop_columns(["bytes"]) if "bytes" in block.column_names else block
        return pa.table({**dict(zip(kept.column_names, kept.columns, strict=True)), **columns})


class EncodeBlocks:
    """Manifest rows (or rows with `pixels`) -> rows of the table, with `stage`, `reason`, `message` where one failed.

    Several blocks may be under way at once: while one is being encoded, the next is being decoded. The network runs
    on one thread, so that its own threads are not multiplied.
    """

    def __init__(self, settings: EncodeSettings, report: Report) -> None:
        with fatal(report):
            self._start(settings, report)

    def _start(self, settings: EncodeSettings, report: Report) -> None:
        self.settings, self.report = settings, report
        torch.set_num_threads(settings.threads)
        self._encoder = ImageEncoder(
            settings.model,
            precision=settings.precision,
            device=settings.device,
            batch_size=settings.batch_size,
            normalize=settings.normalize,
        )
        self._loader = PictureLoader(settings)
        self._gpu = ThreadPoolExecutor(1, "encode", initializer=torch.set_num_threads, initargs=(settings.threads,))
        self.report(
            {
                "worker": {
                    **self._encoder.facts,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "threads": settings.threads,
                }
            }
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._encode_block(block)

    def _encode_block(self, block: pa.Table) -> pa.Table:
        batch_size = self._encoder.batch_size
        pictures = self._unpacked(block) if "pixels" in block.column_names else self._loader.load(block, 2 * batch_size)
        waiting: deque[Future[list[np.ndarray | Refused]]] = deque()
        done: list[Picture | Refused] = []
        vectors: list[np.ndarray | Refused] = []
        while chunk := list(itertools.islice(pictures, batch_size)):
            done += chunk
            waiting.append(self._gpu.submit(self._encode, chunk))
            if len(waiting) > 1:
                vectors += waiting.popleft().result()
        for future in waiting:
            vectors += future.result()
        return _result(block, done, vectors, self.settings.schema, self.settings.features)

    def _unpacked(self, block: pa.Table) -> Iterator[Picture | Refused]:
        shape = (*self.settings.model.image_size, 3)
        names = ("pixels", "height", "width", "stage", "reason", "message")
        for pixels, height, width, stage, reason, message in zip(*(block[n] for n in names), strict=True):
            if reason.is_valid:
                yield Refused(stage.as_py(), reason.as_py(), message.as_py())
            else:
                yield Picture(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape), height.as_py(), width.as_py())

    def _encode(self, chunk: list[Picture | Refused]) -> list[np.ndarray | Refused]:
        """One result per picture; a picture that the network cannot take is refused alone."""
        start = time.perf_counter()
        good = [p for p in chunk if isinstance(p, Picture)]
        encoded = iter(self._try(good))
        result = [next(encoded) if isinstance(p, Picture) else p for p in chunk]
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        return result

    def _try(self, pictures: list[Picture]) -> list[np.ndarray | Refused]:
        if not pictures:
            return []
        try:
            vectors = self._encoder.encode(np.stack([p.pixels for p in pictures]))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(pictures) > 1:
                return [result for picture in pictures for result in self._try([picture])]
            return [Refused("encode", "encode_failed", f"{type(error).__name__}: {error}")]
        return [
            v if np.isfinite(v).all() else Refused("encode", "encode_failed", "the vector is not finite")
            for v in vectors
        ]


def _refusal_columns(results: Iterable[Any]) -> dict[str, pa.Array]:
    refused = [r if isinstance(r, Refused) else None for r in results]
    return {
        name: pa.array([r and getattr(r, name) for r in refused], pa.string())
        for name in ("stage", "reason", "message")
    }


def _result(
    block: pa.Table,
    pictures: list[Picture | Refused],
    vectors: list[np.ndarray | Refused],
    schema: pa.Schema,
    features: dict[str, str],
) -> pa.Table:
    """The table's columns for every row, null where the row was refused, and the refusals' columns."""
    columns: dict[str, pa.Array] = {}
    for field in schema:
        if field.name in features:
            columns[field.name] = _vector_column(vectors, field.type)
        elif field.name in ("height", "width"):
            sizes = [getattr(p, field.name) if isinstance(p, Picture) else None for p in pictures]
            columns[field.name] = pa.array(sizes, pa.int32())
        elif field.name in block.column_names:
            columns[field.name] = block[field.name].combine_chunks().cast(field.type)
        else:
            columns[field.name] = pa.nulls(len(block), field.type)  # `uri` of a manifest of bytes
    return pa.table({**columns, **_refusal_columns(vectors)})


def _vector_column(vectors: list[np.ndarray | Refused], kind: pa.FixedSizeListType) -> pa.Array:
    """n results -> fixed_size_list column of n rows, null where refused."""
    refused = np.array([isinstance(v, Refused) for v in vectors], bool)
    matrix = np.zeros((len(vectors), kind.list_size), kind.value_type.to_pandas_dtype())
    for n, vector in enumerate(vectors):
        if not isinstance(vector, Refused):
            matrix[n] = vector
    return pa.FixedSizeListArray.from_arrays(
        pa.array(matrix.ravel(), kind.value_type), type=kind, mask=pa.array(refused)
    )
