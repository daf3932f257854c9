"""One run at a step, from wherever the last one ended: take stock, encode what is missing, reconcile, commit."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.engine.plan import Plan
from clipray.engine.progress import Progress
from clipray.engine.reader import ReadPlan
from clipray.engine.sink import Regions, Target, Written
from clipray.engine.stream import run_pass
from clipray.inputs.committed_rows import REFUSED, CommittedRows, check_committed, take_back
from clipray.inputs.content_versions import CONTENT_HASH, rows_at_once
from clipray.inputs.manifest import read_rows
from clipray.inputs.row_index import SCAN_BYTES, SCAN_ROWS, RowIndex, contains, hash_strings, row_groups_with
from clipray.pipelines.spec import EncodeSettings
from clipray.steps.base.commit import commit_step
from clipray.steps.base.encode_step import EncodeStep, told_by_shards
from clipray.steps.base.reject_rate import too_many
from clipray.steps.base.step import Snapshot, refuse_stale
from clipray.storage.events import Events
from clipray.storage.parquet import merge_neighbours
from clipray.tables.reasons import passing
from clipray.tables.started import read_started, write_started

STOP_EARLY_REJECTS = 1_000
LAST_PATIENCE = 3  # times that a server may take for a row in the last pass,
PATIENT_ROWS = 1_000  # unless there are more rows than these


class EncodeRun:
    """One run of the step, from wherever the last one ended."""

    def __init__(
        self, step: EncodeStep[Any], plan: Plan, progress: Progress, events: Events, watch: Callable[[Snapshot], None]
    ) -> None:
        self.step, self.plan, self.progress, self.events, self._watch = step, plan, progress, events, watch
        self._began = time.monotonic()
        self._history: list[tuple[float, int]] = []
        self._logged = 0.0
        self._encoded = 0
        self._before: dict[str, int] = {}  # rows by stage when the pass began
        self._streaming_s = 0.0
        self._phase = "starting"
        self._verified: dict[str, tables.Shard] = {}  # by path: what this run has verified or written
        self._patience = 1

    def run(self) -> tables.Record:
        """Encode what is missing, reconcile, commit.

        Raises:
            StaleTableError, RejectRateError, RunError, ClipRayError; what is written by then is kept.
        """
        step = self.step
        attempt, precision = self._start()
        self._take_back()  # those of earlier runs
        stock = self._stock(step.comparison.scan_with_contents())
        self._note_versions()
        self._check_rejects(stock, at_start=True)
        stock = self._encode(stock, f"part-{attempt:04d}", precision)
        if count := self._take_back():
            self._phase = f"again, {count} rows rejected for a passing reason"
            self._patience = LAST_PATIENCE if count <= PATIENT_ROWS else 1
            stock = self._encode(self._stock(), f"part-{attempt:04d}-again", precision)
        self._reconcile(stock)
        self._check_rejects(stock)
        return self._commit(stock)

    def _encode(self, stock: CommittedRows, prefix: str, precision: str) -> CommittedRows:
        """Encode what is not taken yet; rows whose worker dies come again in smaller blocks, and at last are rejected."""
        for number, (rows_per_block, careful) in enumerate(self._passes()):
            todo = self.step.scan.keys[~stock.taken]
            if not len(todo):
                return stock
            if number:
                self.events.write("rows_lost", rows=len(todo), again_in_blocks_of=rows_per_block)
                self._phase = f"again, {len(todo)} rows whose worker died"
            self._pass(todo, rows_per_block, careful, f"{prefix}-{number}", precision, stock)
            stock = self._stock()
        self._reject_the_dead(stock, prefix)
        return self._stock()

    def _take_back(self) -> int:
        """Make rows that were rejected for a passing reason rows to do, unless the run is not to. Returns how many."""
        step = self.step
        count = take_back(step.rejects, step.fingerprint, self._verified) if step.retry else 0
        if count:
            self.events.write("rejects_taken_back", step=step.settings.name, rows=count)
        return count

    def _passes(self) -> list[tuple[int, bool]]:
        rows = self.step.settings.rows_per_block
        return [(rows, False), (max(1, rows // 16), False), (1, True)]

    def _start(self) -> tuple[int, str]:
        """Open the table for writing. Returns the number of this attempt and the precision of the earlier ones."""
        step = self.step
        refuse_stale(step.table, step.inspect(count=False))
        before = read_started(step.table) or told_by_shards(step.table)
        attempt = int(before.get("attempt", 0)) + 1
        facts = {
            "settings": step.identity,
            "fingerprint": step.fingerprint,
            "attempt": attempt,
            "precision": before.get("precision"),
            "started_at": before.get("started_at", tables.now()),
        }
        if step.input_fingerprint:
            facts["rests_on"] = step.input_fingerprint
        comparison = step.comparison
        facts |= comparison.facts(comparison.versions_before)
        if scaling := step.made.get("draft_scaling"):
            facts["draft_scaling"] = scaling
        self._reopen()  # from here on the table is not finished
        if before.get("rests_on", "") != step.input_fingerprint:
            for folder in (step.table, step.rejects):
                tables.remove_own(folder, tables.shard_names(folder))
        write_started(step.table, facts)
        self._facts, self._lookup = facts, step.lookup()
        if step.scan.rejects.num_rows:
            refused = pa.Table.from_pylist(step.scan.rejects.to_pylist(), schema=step.rejects_schema)
            tables.write_shard(step.rejects, REFUSED, "rejects", refused, self._provenance())
        else:
            step.rejects.remove(REFUSED)
        return attempt, before.get("precision") or step.precision

    def _reopen(self) -> None:
        """Make the step's tables unfinished. Pictures whose refused boxes are damaged are made again with them."""
        step, folders = self.step, [self.step.table, self.step.rejects]
        if step.regions:
            folders += [step.regions.table, step.regions.rejects]
            damaged = set(tables.noted_as_damaged(step.regions.rejects) or ())
            tables.remove_own(step.table, damaged & set(tables.shard_names(step.table)))
        for folder in folders:
            tables.reopen(folder)

    def _stock(self, compared: RowIndex | None = None) -> CommittedRows:
        """`compared`: the scan with contents, for rows of earlier runs; those of this one may be newer than it."""
        step = self.step
        scan = compared or step.scan
        stock = check_committed(
            step.table, step.rejects, scan, step.keep, step.fingerprint, regions=step.regions, verified=self._verified
        )
        if stock.repaired:
            self.events.write("repaired", step=step.settings.name, **stock.repaired)
        return stock

    def _note_versions(self) -> None:
        """All rows on disk have been compared with the manifest as it is now: the next attempt need not read it again."""
        versions = self.step.scan.versions
        if self._facts.get("manifest_versions", versions) != versions:
            self._facts["manifest_versions"] = versions
            write_started(self.step.table, self._facts)

    def _provenance(self) -> dict[str, Any]:
        return self.step.provenance(self._facts.get("precision") or self.step.precision)

    def _encoder_provenance(self) -> dict[str, Any]:
        """Provenance with the precision that the encoders chose; they say so before their first block."""
        for _ in range(100):
            self._learn_precision(self.progress.state())
            if self._facts.get("precision"):
                break
            time.sleep(0.1)
        return self._provenance()

    def _learn_precision(self, board: dict[str, Any]) -> None:
        """Keep what `precision: auto` became, so that the next attempt goes on with the same, on whatever machine."""
        if board["workers"] and not self._facts.get("precision"):
            self._facts["precision"] = next(iter(board["workers"].values()))["precision"]
            write_started(self.step.table, self._facts)

    def _pass(
        self, todo: np.ndarray, rows_per_block: int, careful: bool, prefix: str, precision: str, stock: CommittedRows
    ) -> None:
        step, settings = self.step, self.step.settings
        encode = step.encoder(precision, self.plan.device, self.plan.threads)
        if isinstance(encode, EncodeSettings):
            encode = replace(encode, limits=replace(encode.limits, patience=self._patience))
        self._before = dict(self.progress.known["rows"])
        target = Target(
            step.table,
            step.rejects,
            step.schema,
            step.rejects_schema,
            prefix,
            settings.rows_per_file,
            settings.flush_s,
            Regions(step.regions.table, step.regions.rejects, step.region_schema) if step.regions else None,
            step.manifest.kind,
        )
        columns = step.manifest.columns(step.keep)
        work = ReadPlan(
            row_groups_with(step.manifest, step.scan, todo),
            columns,
            todo,
            step.scan.salt,
            step.scan.refused,
            rows_per_block,
            careful,
            step.comparison.contents,
            step.manifest.kind,
            step.manifest.schema,
            *(self._lookup or ()),
        )
        began = time.monotonic()
        try:
            run_pass(
                work,
                self.plan,
                encode,
                target,
                self.progress,
                lambda written, board: self._observe(stock, written, board),
                self._encoder_provenance,
            )
        finally:
            self._streaming_s += time.monotonic() - began
            self.events.write("pass_ended", step=settings.name, rows_by_node=self.progress.state()["nodes"])

    def _observe(self, stock: CommittedRows, written: Written, board: dict[str, Any]) -> None:
        """Once a second: keep the workers' precision for the next attempt, show, log, stop when too much is rejected."""
        name, now = self.step.settings.name, time.monotonic()
        self._learn_precision(board)
        self._verified.update(written.shards)
        self._encoded = board["rows"].get("encode", 0)
        self._phase = "encoding" if self._encoded and self._phase == "starting" else self._phase
        self._history = [*self._history, (now, self._encoded)]
        self._history = [h for h in self._history if now - h[0] <= 30 and h[1]] or self._history[-1:]
        (then, before), rejected = self._history[0], stock.rejected + sum(written.rejects.values())
        rate = (self._encoded - before) / (now - then) if now > then else 0.0
        left = self.step.scan.rows - stock.rows - stock.rejected - self._encoded
        stages = {
            stage: {
                "rows": rows,
                "busy_s": round(board["seconds"][stage], 1),
                "rows_per_busy_s": round(rows / max(1e-9, board["seconds"][stage]), 1),
            }
            for stage, rows in board["rows"].items()
        }
        shot = Snapshot(
            name,
            self.step.scan.rows,
            stock.rows + written.rows,
            rejected,
            self._encoded,
            rate,
            max(0, left) / rate if rate else None,
            stages,
            self._phase,
            self._queues(board["rows"], written),
        )
        self._watch(shot)
        if now - self._logged >= 5:
            self._logged = now
            self.events.write("progress", **asdict(shot))
        self._stop_early(Counter(stock.rejects) + Counter(written.rejects))

    def _stop_early(self, reasons: Counter[str]) -> None:
        """Raises RejectRateError where so many rows are rejected for good that the last pass cannot mend it."""
        lasting = reasons.total() - (passing(reasons) if self.step.retry else 0)
        if lasting >= STOP_EARLY_REJECTS and lasting > self.step.settings.max_reject_rate * self.step.scan.rows:
            raise too_many(self.step, reasons)

    def _queues(self, rows: dict[str, int], written: Written) -> dict[str, int]:
        """Rows between the stages of this pass, by the stage that they wait for; a lost block waits until its end."""
        passed = {stage: count - self._before.get(stage, 0) for stage, count in rows.items()}
        passed["write"] = written.rows + sum(written.rejects.values())
        stages = [stage for stage in ("read", "decode", "encode", "write") if stage in passed]
        return {after: max(0, passed[before] - passed[after]) for before, after in itertools.pairwise(stages)}

    def _reject_the_dead(self, stock: CommittedRows, prefix: str) -> None:
        """Rows that were alone when their worker died, twice, in the last pass."""
        dead = step_rows(self.step, self.step.scan.keys[~stock.taken])
        if not dead.num_rows:
            return
        rows = [
            {
                **row,
                "stage": "encode",
                "reason": "worker_died",
                "message": "the worker process died twice while it held this row alone",
            }
            for row in dead.to_pylist()
        ]
        data = pa.Table.from_pylist(rows, schema=self.step.rejects_schema)
        tables.write_shard(self.step.rejects, f"{prefix}-dead.parquet", "rejects", data, self._provenance())

    def _check_rejects(self, stock: CommittedRows, *, at_start: bool = False) -> None:
        rows, limit = self.step.scan.rows, self.step.settings.max_reject_rate
        own = self.step.scan.rejects
        if at_start and own.num_rows:
            example = own.slice(0, 1).to_pylist()[0]
            self.events.write("manifest_rejects", rows=own.num_rows, example=example["message"])
        rejected = own.num_rows if at_start else stock.rejected
        if rejected > limit * rows:
            raise too_many(self.step, stock.rejects)

    def _reconcile(self, stock: CommittedRows) -> None:
        rows = self.step.scan.rows
        if stock.rows + stock.rejected != rows or not stock.taken.all():
            raise AssertionError(f"rows in = {rows}, but {stock.rows} written + {stock.rejected} rejected")

    def _commit(self, stock: CommittedRows) -> tables.Record:
        return commit_step(
            self.step,
            stock,
            self._provenance(),
            workers=list(self.progress.state()["workers"].values()),
            seconds=round(time.monotonic() - self._began, 2),
            rows_per_s=round(self._encoded / self._streaming_s, 2) if self._streaming_s else 0.0,
        )


def step_rows(step: EncodeStep[Any], keys: np.ndarray) -> pa.Table:
    """Identity and sources of the manifest rows with these keys ((n,) uint64, sorted)."""
    kind, contents = step.manifest.kind, step.comparison.contents
    names = [*kind.named, *(field.name for field in step.hash_fields)]
    wanted = {*kind.named, *(contents.columns if contents else ())}
    columns = [c for c in step.manifest.columns() if c in wanted]
    found = [pa.table({c: pa.array([], pa.string()) for c in names})]
    for row_group in merge_neighbours(row_groups_with(step.manifest, step.scan, keys), SCAN_ROWS, SCAN_BYTES):
        for read in read_rows(row_group, columns, rows_at_once(row_group), kind, step.manifest.schema):
            here = contains(keys, hash_strings(read.table[kind.key], step.scan.salt))
            here &= ~np.isin(read.numbers, step.scan.refused.get(row_group.file, ()))
            rows = read.table.filter(pa.array(here))
            if contents:
                rows = rows.append_column(CONTENT_HASH, contents.hashes(rows))
            for name in set(names) - set(rows.column_names):
                rows = rows.append_column(name, pa.nulls(len(rows), pa.string()))
            found.append(rows.select(names))
    return pa.concat_tables(found)
