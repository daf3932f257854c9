"""Blocks of manifest rows to blocks of the table's rows: what all encoders of blocks share."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch

from clipray.models.encoder import Encoder
from clipray.pipelines.region_boxes import ImageRegions, region_columns, region_vector_field
from clipray.pipelines.spec import EncoderSpec, Report
from clipray.tables import fits, number_array
from clipray.tables.reasons import Rejected


@dataclass(frozen=True)
class Row:
    """An encoded row: its values by column (vectors are arrays), and its regions where the table has some."""

    values: Mapping[str, np.ndarray | str | float | bool | None]
    regions: ImageRegions | None = None


SpecT = TypeVar("SpecT", bound=EncoderSpec)
EncoderT = TypeVar("EncoderT", bound=Encoder[Any])
Item = TypeVar("Item")
Result = TypeVar("Result")


class BlockEncoder(ABC, Generic[SpecT, EncoderT, Item]):
    """Manifest rows -> rows of the table, with `stage`, `reason`, `message` where one was rejected.

    Several blocks may be under way at once: while one is encoded, the next is loaded.
    """

    inputs_per_row = 1  # of the network, as a rule

    def __init__(self, spec: SpecT, report: Report, encoder: Callable[..., EncoderT]) -> None:
        self.spec, self.report = spec, report
        self._networks, self.encoder = start_encoder(encoder, spec)
        self._turn = threading.Lock()  # blocks end one after another, not all at the same late moment
        place = {"pid": os.getpid(), "host": socket.gethostname()}
        report({"worker": {**self.encoder.facts, **place, "threads": spec.threads}})

    @abstractmethod
    def load(self, block: pa.Table) -> Iterator[Item | Rejected]:
        """The input of the network for each row, in order, loaded at most `self.ahead` rows ahead."""

    @abstractmethod
    def encode(self, items: Sequence[Item]) -> Sequence[Row | Rejected]:
        """A result for each item, in a thread of the network.

        After a RuntimeError or ValueError, the items are encoded one by one; an item that fails again is rejected.
        """

    def shape(self, item: Item) -> Hashable:  # noqa: ARG002
        """Only items of one shape are encoded together."""
        return None

    @property
    def batch_rows(self) -> int:
        """Rows that fill the network's batch."""
        return max(1, self.encoder.batch_size // self.inputs_per_row)

    @property
    def chunk_rows(self) -> int:
        """Rows that `encode` takes at a time."""
        return self.batch_rows

    @property
    def ahead(self) -> int:
        """Rows to load before they are needed."""
        return (1 + self.spec.at_once) * self.batch_rows

    def __call__(self, block: pa.Table) -> pa.Table:
        items, chunk_rows = self.load(block), self.chunk_rows
        waiting: deque[Future[list[Row | Rejected]]] = deque()
        rows: list[Row | Rejected] = []
        with self._turn:
            while chunk := list(itertools.islice(items, chunk_rows)):
                waiting.append(self._networks.submit(self._encode_chunk, chunk))
                if len(waiting) > self.spec.at_once:
                    rows += waiting.popleft().result()
        for future in waiting:
            rows += future.result()
        return self._table(block, rows)

    def _encode_chunk(self, chunk: list[Item | Rejected]) -> list[Row | Rejected]:
        start = time.perf_counter()
        rows = [self._checked(row) for row in encode_or_reject(self.encode, chunk, self.shape)]
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        return rows

    def _checked(self, row: Row | Rejected) -> Row | Rejected:
        if isinstance(row, Rejected):
            return row
        vectors = [(x, self.spec.schema.field(name)) for name, x in row.values.items() if isinstance(x, np.ndarray)]
        if row.regions is not None and self.spec.region_schema is not None:
            vectors.append((row.regions.vectors, region_vector_field(self.spec.region_schema)))
        if all(fits(x, field.type) for x, field in vectors):
            return row
        return Rejected("encode", "encode_failed", "a vector is not finite, or too large for its column")

    def _table(self, block: pa.Table, rows: Sequence[Row | Rejected]) -> pa.Table:
        """The table's columns, nested regions, and the columns of the rejected."""
        columns = {field.name: _column(field, block, rows) for field in self.spec.schema}
        if self.spec.region_schema is not None:
            regions = [row.regions if isinstance(row, Row) else None for row in rows]
            columns |= region_columns(block["image_id"].to_pylist(), regions, self.spec.region_schema)
        return pa.table({**columns, **rejection_columns(rows)})


def start_encoder(encoder: Callable[..., EncoderT], spec: EncoderSpec) -> tuple[ThreadPoolExecutor, EncoderT]:
    """An encoder of `spec.model`, and the threads that start and run it.

    torch's own threads are divided among `spec.at_once` batches.
    """
    threads_each = max(1, spec.threads // spec.at_once)
    threads = ThreadPoolExecutor(spec.at_once, "encode", initializer=torch.set_num_threads, initargs=(threads_each,))
    started = threads.submit(
        encoder,
        spec.model,
        precision=spec.precision,
        device=spec.device,
        batch_size=spec.batch_size,
        normalize=spec.normalize,
    )
    return threads, started.result()


def encode_or_reject(
    encode: Callable[[Sequence[Item]], Sequence[Result | Rejected]],
    items: Sequence[Item | Rejected],
    shape: Callable[[Item], Hashable] = lambda _: None,
) -> list[Result | Rejected]:
    """A result for each item: the rejected stay as they are, and those of one shape are encoded together.

    Where that fails, each is encoded alone, and rejected if it fails again.
    """
    results: dict[int, Result | Rejected] = {}
    groups: dict[Hashable, dict[int, Item]] = defaultdict(dict)
    for n, item in enumerate(items):
        if isinstance(item, Rejected):
            results[n] = item
        else:
            groups[shape(item)][n] = item
    for group in groups.values():
        results |= zip(group, _encode_or_split(encode, list(group.values())), strict=True)
    return [results[n] for n in range(len(items))]


def _encode_or_split(
    encode: Callable[[Sequence[Item]], Sequence[Result | Rejected]], items: Sequence[Item]
) -> Sequence[Result | Rejected]:
    try:
        return encode(items)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
            raise
        if len(items) > 1:
            return [result for item in items for result in _encode_or_split(encode, [item])]
        return [Rejected("encode", "encode_failed", f"{type(error).__name__}: {error}")]


def rejection_columns(rows: Sequence[object]) -> dict[str, pa.Array]:
    rejected = [row if isinstance(row, Rejected) else None for row in rows]
    return {
        name: pa.array([row and getattr(row, name) for row in rejected], pa.string())
        for name in ("stage", "reason", "message")
    }


def _column(field: pa.Field, block: pa.Table, rows: Sequence[Row | Rejected]) -> pa.Array:
    """From the encoded rows, else from the block; else null, as `uri` of a manifest of bytes."""
    if any(isinstance(row, Row) and field.name in row.values for row in rows):
        values = [row.values[field.name] if isinstance(row, Row) else None for row in rows]
        if pa.types.is_fixed_size_list(field.type):
            return _vectors([x if isinstance(x, np.ndarray) else None for x in values], field.type)
        return pa.array(values, field.type)
    if field.name in block.column_names:
        return block[field.name].combine_chunks().cast(field.type)
    return pa.nulls(len(block), field.type)


def _vectors(values: Sequence[np.ndarray | None], vector_type: pa.FixedSizeListType) -> pa.Array:
    """n vectors -> fixed_size_list column of n rows, null where there is none."""
    nothing = np.zeros(vector_type.list_size, vector_type.value_type.to_pandas_dtype())
    matrix = np.stack([nothing if vector is None else vector for vector in values]).astype(nothing.dtype, copy=False)
    missing = pa.array([vector is None for vector in values])
    return pa.FixedSizeListArray.from_arrays(number_array(matrix.ravel()), type=vector_type, mask=missing)
