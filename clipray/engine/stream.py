"""One pass over a manifest: read -> (decode in tasks) -> encoders -> shards, on Ray Data.

A pass never raises for a block that was lost because its worker died: its rows are simply not written, and the
caller, who counts what is on disk, sends them through again in smaller blocks.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from clipray.encoders.pipeline import DecodeBlocks, EncodeBlocks, EncodeSettings, fatal
from clipray.engine.plan import DECODE_CPUS, READ_CPUS, WRITE_CPUS, Plan
from clipray.engine.progress import Progress, Reporter
from clipray.errors import RunError
from clipray.manifest import Piece, contains, hash_strings, read_piece
from clipray.storage import Folder
from clipray.tables import write_shard

BLOCK_BYTES = 64 * 2**20
WRITES_AHEAD = 2
LOST_BLOCKS = 64  # more deaths than this in one pass and something else is wrong


@dataclass(frozen=True)
class Pass:
    """One pass: what to read and how finely.

    Attributes:
        pieces: row groups that hold wanted rows.
        columns: columns to read.
        wanted: (n,) uint64 sorted keys of the rows to encode, under `salt`.
        refused: file number -> row numbers that are no work (repeated ids among them, whose key is wanted once).
        rows_per_block: rows that are lost together when a worker dies.
        careful: one block at a time in each encoder, tried twice: whoever is lost now is itself the cause.
    """

    pieces: Sequence[Piece]
    columns: Sequence[str]
    wanted: np.ndarray
    salt: str
    refused: dict[int, np.ndarray]
    rows_per_block: int
    careful: bool = False


@dataclass(frozen=True)
class Target:
    """Where rows go."""

    table: Folder
    rejects: Folder
    schema: pa.Schema
    rejects_schema: pa.Schema
    prefix: str
    rows_per_file: int
    flush_s: float


@dataclass
class Written:
    """What a pass has written so far."""

    rows: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    files: int = 0


def run_pass(
    this: Pass,
    plan: Plan,
    settings: EncodeSettings,
    target: Target,
    progress: Progress,
    watch: Callable[[Written, dict[str, Any]], None],
    provenance: Callable[[], dict[str, Any]],
) -> Written:
    """Stream the wanted rows through the encoders and write them.

    `watch` is called about every second; `provenance` before each shard, once an encoder has said what it is.

    Raises:
        RunError: an encoder cannot start, or workers die over and over.
    """
    written = Written()
    sink = _Sink(target, written, provenance)
    try:
        for bundle in _timed(
            _dataset(this, plan, settings, progress.reporter), lambda: _observe(progress, written, watch)
        ):
            for entry in bundle.blocks:
                sink.add(entry.ref, entry.metadata.num_rows or 0)
    except ray.exceptions.RayError as error:
        sink.flush()
        raise RunError(_explain(progress.state()["fatal"] or error)) from error
    except KeyboardInterrupt:
        sink.flush()
        raise
    sink.flush()
    _observe(progress, written, watch)
    return written


def _observe(progress: Progress, written: Written, watch: Callable[[Written, dict[str, Any]], None]) -> None:
    state = progress.state()
    watch(written, state)
    if state["fatal"]:
        raise RunError(_explain(state["fatal"]))


def _dataset(this: Pass, plan: Plan, settings: EncodeSettings, report: Reporter) -> Any:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = LOST_BLOCKS if not this.careful else -1
    wanted = ray.put(this.wanted)
    refused = ray.put(this.refused)
    mean_bytes = sum(p.bytes for p in this.pieces) / max(1, sum(p.rows for p in this.pieces))
    rows = max(1, min(this.rows_per_block, int(BLOCK_BYTES / max(1.0, mean_bytes))))
    read = _Reader(tuple(this.columns), this.salt, [wanted], [refused], rows, report)
    retries = 1  # a death that is nobody's fault costs a block one more try
    data = ray.data.from_items(
        [asdict(piece) for piece in this.pieces], override_num_blocks=min(len(this.pieces), 4096)
    )
    data = data.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=READ_CPUS)
    data = data.repartition(target_num_rows_per_block=rows)
    if plan.decode_in == "tasks":
        data = data.map_batches(
            DecodeBlocks(settings, report),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=DECODE_CPUS,
            max_retries=retries,
        )
    pool = ray.data.ActorPoolStrategy(
        min_size=plan.min_actors,
        max_size=plan.max_actors,
        max_tasks_in_flight_per_actor=1 if this.careful else 4,
        max_concurrent_calls_per_actor=1 if this.careful else 2,
        enable_true_multi_threading=True,
    )
    return data.map_batches(
        EncodeBlocks,
        fn_constructor_kwargs={"settings": settings, "report": report},
        batch_size=None,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor,
        max_restarts=-1,  # the task's own retries end it, so a poison row cannot restart its worker for ever
        max_task_retries=retries,
    )


class _Reader:
    """A row group -> the wanted rows in it, in blocks."""

    def __init__(
        self, columns: Sequence[str], salt: str, wanted: list[Any], refused: list[Any], rows: int, report: Reporter
    ) -> None:
        # The references travel inside lists: bare ones would be replaced by copies of the arrays.
        self.columns, self.salt, self.wanted, self.refused, self.rows, self.report = (
            columns,
            salt,
            wanted,
            refused,
            rows,
            report,
        )

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        with fatal(self.report):
            for piece in pieces.to_pylist():
                yield from self._read(Piece(**piece))

    def _read(self, piece: Piece) -> Iterator[pa.Table]:
        wanted, refused = ray.get([self.wanted[0], self.refused[0]])
        for first, table in read_piece(piece, self.columns, self.rows):
            keep = contains(wanted, hash_strings(table["image_id"], self.salt))
            keep &= ~np.isin(np.arange(first, first + len(table)), refused.get(piece.file, ()))
            if keep.any():
                yield table if keep.all() else table.filter(pa.array(keep))


def _timed(data: Any, tick: Callable[[], None]) -> Iterator[Any]:
    """The stream's bundles; `tick` runs about once a second in between, also while none comes."""
    results: queue.Queue[Any] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def pull() -> None:
        try:
            for bundle in data.iter_internal_ref_bundles():
                while not stop.is_set():
                    with contextlib.suppress(queue.Full):
                        results.put(bundle, timeout=0.5)
                        break
                if stop.is_set():
                    return
            results.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            results.put(error)

    threading.Thread(target=pull, daemon=True, name="clipray-stream").start()
    last = time.monotonic()
    try:
        while True:
            try:
                item = results.get(timeout=0.5)
            except queue.Empty:
                item = ()
            if time.monotonic() - last >= 1:
                tick()
                last = time.monotonic()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if item != ():
                yield item
    finally:
        stop.set()


class _Sink:
    """Collects finished blocks and writes them as shards: when `rows_per_file` are there, or `flush_s` have passed.

    The first block is written at once. Only references pass through here; tasks beside the data write the files, whose
    names are fixed before they start, so that a task that is run again overwrites its own file.
    """

    def __init__(self, target: Target, written: Written, provenance: Callable[[], dict[str, Any]]) -> None:
        self._target, self._written, self._provenance = target, written, provenance
        self._blocks: list[Any] = []
        self._rows = 0
        self._count = 0
        self._last = 0.0
        self._pending: list[Any] = []

    def add(self, ref: Any, rows: int) -> None:
        if rows:
            self._blocks.append(ref)
            self._rows += rows
        if self._rows >= self._target.rows_per_file or (
            self._rows and time.monotonic() - self._last >= self._target.flush_s
        ):
            self._start()
        self._collect(WRITES_AHEAD)

    def flush(self) -> None:
        """Write what is there and wait until everything is on disk."""
        if self._rows:
            self._start()
        self._collect(0)

    def _start(self) -> None:
        name = f"{self._target.prefix}-{self._count:06d}.parquet"
        task = _write.options(num_cpus=WRITE_CPUS, max_retries=3)
        self._pending.append(task.remote(self._target, self._provenance(), name, *self._blocks))
        self._blocks, self._rows, self._last = [], 0, time.monotonic()
        self._count += 1

    def _collect(self, leave: int) -> None:
        ready, _ = ray.wait(self._pending, num_returns=len(self._pending), timeout=0) if self._pending else ([], [])
        while len(self._pending) - len(ready) > leave:
            ready, _ = ray.wait(self._pending, num_returns=len(self._pending) - leave)
        for ref in ready:
            self._pending.remove(ref)
            rows, rejects = ray.get(ref)
            self._written.rows += rows
            self._written.files += 1 if rows else 0
            for reason, count in rejects.items():
                self._written.rejects[reason] = self._written.rejects.get(reason, 0) + count


@ray.remote
def _write(target: Target, provenance: dict[str, Any], name: str, *blocks: pa.Table) -> tuple[int, dict[str, int]]:
    """Split finished blocks into rows and rejects and write a shard of each. Returns (rows, rejects by reason)."""
    data = pa.concat_tables(blocks)
    refused = data["reason"].is_valid()
    bad = data.filter(refused).select(target.rejects_schema.names).cast(target.rejects_schema)
    good = data.filter(pc.invert(refused)).select(target.schema.names)
    good = pa.table(list(good.columns), schema=target.schema) if good.num_rows else good
    if bad.num_rows:
        write_shard(target.rejects, name, "rejects", bad, provenance)
    if good.num_rows:
        write_shard(target.table, name, "images", good, provenance)
    return good.num_rows, {v["values"]: v["counts"] for v in bad["reason"].value_counts().to_pylist()}


def _explain(error: BaseException | str) -> str:
    """The cause of a failed pass in one line."""
    while getattr(error, "cause", None) is not None:
        error = error.cause  # type: ignore[union-attr]
    text = " ".join(str(error).split())
    return f"workers failed and the run could not go on; everything written is kept, and `clipray run` goes on from there. Cause: {text[-600:]}"
