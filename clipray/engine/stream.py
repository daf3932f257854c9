"""One pass over a manifest: read -> (decode in tasks) -> encoders -> shards, on Ray Data.

A pass never raises for a block that was lost because its worker died: its rows are simply not written, and the
caller, who counts what is on disk, sends them through again in smaller blocks.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from clipray.engine.connect import abandon, abandoned, answers
from clipray.engine.health import GOES_ON, Health, refuse_dying, unwrapped
from clipray.engine.plan import DECODE_CPUS, READ_CPUS, Plan
from clipray.engine.progress import Progress, Reporter
from clipray.engine.ray_internals import FinishedBlock, finished_blocks, without_data_actors
from clipray.engine.sink import Sink, Target, Written
from clipray.engine.workers import Decode, Encode, Reader, ReadPlan
from clipray.errors import RunError
from clipray.pipelines.spec import EncoderSpec, ImageSpec
from clipray.storage.parquet import merge_neighbours

BLOCK_BYTES = 64 * 2**20
READ_ROWS = 16_384  # of small row groups that one task reads together: it costs as much as some thousands of rows
STOP_S = 15.0  # for the last rows of a run that is stopped
LOST_BLOCKS, LOST_SHARE = 64, 0.1  # more lost blocks than both in one pass, and it is no matter of single rows


def run_pass(
    this: ReadPlan,
    plan: Plan,
    spec: EncoderSpec,
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

    def observe() -> None:
        state = progress.state()
        watch(written, state)
        if state["fatal"]:
            raise RunError(_explain(state["fatal"]))
        refuse_dying(state["starts"], plan.max_actors)

    sink = Sink(target, written, provenance, local=plan.nodes == 1, nodes=plan.nodes)
    spared = without_data_actors() if plan.local else contextlib.nullcontext()
    try:
        data = _dataset(this, plan, spec, progress.reporter)
        with spared, contextlib.closing(_timed(data, observe)) as blocks:
            for block in blocks:
                sink.add(*block)
    except (ray.exceptions.RayError, ExecutionTimeoutError, KeyboardInterrupt) as error:
        with contextlib.suppress(ray.exceptions.RayError):  # Ray may have been stopped with us
            sink.flush(STOP_S)
        if isinstance(error, KeyboardInterrupt):
            raise
        fatal = progress.state()["fatal"]
        raise (RunError(_explain(fatal)) if fatal else unwrapped(error)) from error
    sink.flush()
    observe()
    return written


def _dataset(this: ReadPlan, plan: Plan, spec: EncoderSpec, report: Reporter) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False  # clipray's are shown
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # which Ray Data sets anew when it is imported
    mean_bytes = sum(p.bytes for p in this.row_groups) / max(1, sum(p.rows for p in this.row_groups))
    rows = max(1, min(this.rows_per_block, int(BLOCK_BYTES / max(1.0, mean_bytes))))
    context.max_errored_blocks = -1 if this.careful else max(LOST_BLOCKS, int(LOST_SHARE * len(this.wanted) / rows))
    lookup = [ray.put(this.lookup)] if this.lookup else []
    read = Reader(this, [ray.put(this.wanted)], [ray.put(this.rejected)], lookup, rows, report)
    # A lost block comes again in the next, finer pass; only a row that was alone gets a second try at once, since
    # its loss is final.
    retries = 1 if this.careful else 0
    items = [asdict(row_group) for row_group in merge_neighbours(this.row_groups, READ_ROWS, BLOCK_BYTES)]
    data: Any = ray.data.from_items(items, override_num_blocks=min(len(items), 4096))
    data = data.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=READ_CPUS)
    data = data.repartition(target_num_rows_per_block=rows)
    if plan.decode_in == "tasks" and isinstance(spec, ImageSpec):
        data = data.map_batches(
            Decode(spec, report),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=DECODE_CPUS,
            label_selector=dict(plan.decode_on) or None,
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
        Encode,
        fn_constructor_kwargs={"spec": spec, "report": report},
        batch_size=rows if plan.gpus_per_actor else None,  # whole blocks; with GPUs Ray Data asks for a number
        batch_format="pyarrow",
        compute=pool,
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor,
        label_selector=dict(plan.encode_on) or None,
        max_restarts=-1,  # the task's own retries end it, so a poison row cannot restart its worker for ever
        max_task_retries=retries,
    )


def _timed(data: Any, tick: Callable[[], None]) -> Generator[FinishedBlock]:
    """The stream's finished blocks; `tick` runs about once a second in between, also while none comes."""
    results: queue.Queue[Any] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def pull() -> None:
        try:
            for block in finished_blocks(data):
                while not stop.is_set():
                    with contextlib.suppress(queue.Full):
                        results.put(block, timeout=0.5)
                        break
                if stop.is_set():
                    return
            results.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            results.put(error)

    thread = threading.Thread(target=pull, daemon=True, name="clipray-stream")
    thread.start()
    last, health = time.monotonic(), Health()
    try:
        while True:
            try:
                item = results.get(timeout=0.5)
                health.progressed()
            except queue.Empty:
                item = ()
                health.look()
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
        _end(thread)


def _end(thread: threading.Thread) -> None:
    """Wait for the thread that waits for Ray, as long as Ray is there."""
    until = time.monotonic() + STOP_S
    thread.join(1)
    while thread.is_alive() and time.monotonic() < until and not abandoned() and answers():
        thread.join(1)
    if thread.is_alive():
        abandon()


def _explain(fatal: str) -> str:
    """What a worker said before it gave up, in one line."""
    return f"workers failed and the run could not go on; {GOES_ON}. Cause: {fatal[-600:]}"
