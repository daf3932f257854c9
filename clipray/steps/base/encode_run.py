"""One run of a step: count what is on disk, encode what is missing, reconcile, commit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from clipray import tables
from clipray.engine.plan import Plan, make_plan
from clipray.engine.progress import Progress
from clipray.engine.sink import Target, Written
from clipray.engine.stream import run_pass
from clipray.engine.workers import ReadPlan
from clipray.errors import RejectRateError
from clipray.inputs.committed_rows import REFUSED, CommittedRows, RegionFolders, take_back
from clipray.inputs.content_versions import CONTENT_HASH
from clipray.inputs.key_index import ABSENT, KeyIndex
from clipray.inputs.manifest import read_rows
from clipray.inputs.row_index import SCAN_BYTES, SCAN_ROWS, RowIndex, row_groups_with, rows_at_once
from clipray.job.row_spec import IMAGES
from clipray.pipelines.spec import ImageSpec
from clipray.steps.base.encode_step import EncodeStep, told_by_shards
from clipray.steps.base.monitor import StreamTicker
from clipray.steps.base.step import RunContext
from clipray.storage.parquet import merge_neighbours
from clipray.tables.reasons import passing
from clipray.tables.scan import figures_of
from clipray.tables.started import read_started, write_started

STOP_EARLY_REJECTS = 1_000
LAST_PATIENCE = 3  # times that a server may take for a row in the last pass,
PATIENT_ROWS = 1_000  # unless there are more rows than these


def encode_rows(step: EncodeStep[Any], run: RunContext) -> tables.Record:
    """Encode the rows of a step's manifest that are not on disk yet, and commit; see `EncodeRun.finish`."""
    _ = step.widths  # an unknown layer is an error before any work
    rejects, plan = step.scan.rejects, make_plan(step.settings, run.cluster())
    if rejects.num_rows:
        run.say(
            f"{step.name}: {rejects.num_rows} of {step.total} manifest rows have no id, a repeated one or a string that is not UTF-8 and are rejected, e.g. {rejects['message'][0].as_py()}"
        )
    run.say(f"{step.name}: {plan.sentence()}")
    run.events.write(
        "step_started", step=step.name, rows=step.total, plan=plan.sentence(), fingerprint=step.fingerprint
    )
    step.before_encoding(run)
    return EncodeRun(step, plan, run).finish()


class EncodeRun:
    """One run of a step, which goes on where the last one ended."""

    def __init__(self, step: EncodeStep[Any], plan: Plan, run: RunContext) -> None:
        self.step, self.plan, self.events = step, plan, run.events
        self.progress, self.ticker = Progress(), StreamTicker(run, step.name, step.total)
        self._began = time.monotonic()
        self._streaming_s = 0.0
        self._verified: dict[str, tables.Shard] = {}  # by path: what this run has verified or written
        self._patience = 1

    def finish(self) -> tables.Record:
        """Encode what is missing, reconcile, commit.

        Raises:
            StaleTableError, RejectRateError, RunError, ClipRayError; what is written by then is kept.
        """
        step = self.step
        attempt, precision = self._start()
        self._take_back()  # those of earlier runs
        committed = self._check_committed(step.comparison.scan_with_contents())
        self._note_versions()
        self._check_manifest_rejects(committed)
        committed, is_current = self._encode(committed, f"part-{attempt:04d}", precision)
        if count := self._take_back():
            self.ticker.phase = f"again, {count} rows rejected for a temporary reason"
            self._patience = LAST_PATIENCE if count <= PATIENT_ROWS else 1
            committed, is_current = self._encode(self._check_committed(), f"part-{attempt:04d}-again", precision)
        if not is_current:
            committed = self._check_committed()
        rows, rejected = committed.rows, committed.rejected
        if rows + rejected != step.total or not committed.done.all():
            raise AssertionError(f"rows in = {step.total}, but {rows} written + {rejected} rejected")
        if self._are_too_many(committed.rejects):
            raise self._too_many(committed.rejects)
        return self._commit(committed)

    def _encode(self, committed: CommittedRows, prefix: str, precision: str) -> tuple[CommittedRows, bool]:
        """Encode what is not done yet. Rows whose worker died are tried again in smaller blocks, and rejected in the end.

        Returns what was committed when the last pass began, and whether that is still so.
        """
        rows = self.step.settings.rows_per_block
        for number, (rows_per_block, careful) in enumerate([(rows, False), (max(1, rows // 16), False), (1, True)]):
            todo = self.step.scan.index.where(~committed.done)
            if not len(todo):
                return committed, True
            if number:
                self.events.write("rows_lost", rows=len(todo), again_in_blocks_of=rows_per_block)
                self.ticker.phase = f"again, {len(todo)} rows whose worker died"
            written = self._pass(todo, rows_per_block, careful, f"{prefix}-{number}", precision, committed)
            if written.rows + sum(written.rejects.values()) == len(todo):
                return committed, False
            committed = self._check_committed()
        self._reject_the_dead(committed, prefix)
        return committed, False

    def _take_back(self) -> int:
        """Make rows that were rejected for a temporary reason rows to do, unless the run is not to. Returns how many."""
        step = self.step
        count = take_back(step.rejects, step.fingerprint, self._verified) if step.retry else 0
        if count:
            self.events.write("rejects_taken_back", step=step.name, rows=count)
        return count

    def _start(self) -> tuple[int, str]:
        """Open the table for writing. Returns the number of this attempt and the precision that earlier ones used."""
        step = self.step
        before = read_started(step.table) or told_by_shards(step.table)
        attempt = int(before.get("attempt", 0)) + 1
        facts = {
            "settings": step.identity,
            "fingerprint": step.fingerprint,
            "attempt": attempt,
            "precision": before.get("precision"),
            "started_at": before.get("started_at", tables.now()),
            **step.comparison.facts(step.comparison.versions_before),
        }
        if step.lookup_digest:
            facts["rests_on"] = step.lookup_digest
        if scaling := step.row_provenance.get("draft_scaling"):
            facts["draft_scaling"] = scaling
        self._reopen()  # from here on the table is not finished
        if before.get("rests_on", "") != step.lookup_digest:
            for folder in (step.table, step.rejects):
                tables.remove_own(folder, tables.shard_names(folder))
        write_started(step.table, facts)
        self._facts, self._lookup = facts, step.lookup()
        if step.scan.rejects.num_rows:
            self._write_rejects(REFUSED, step.scan.rejects.to_pylist())
        else:
            step.rejects.remove(REFUSED)
        return attempt, before.get("precision") or step.precision

    def _reopen(self) -> None:
        """Make the step's tables unfinished. Images whose rejected boxes are damaged are encoded again."""
        step, folders = self.step, [self.step.table, self.step.rejects]
        if step.regions:
            folders += [step.regions.table, step.regions.rejects]
            damaged = set(tables.noted_as_damaged(step.regions.rejects) or ())
            tables.remove_own(step.table, damaged & set(tables.shard_names(step.table)))
        for folder in folders:
            tables.reopen(folder)

    def _check_committed(self, compared: RowIndex | None = None) -> CommittedRows:
        """compared: the manifest's rows with their contents, to compare rows of earlier runs; rows of this run may be newer."""
        committed = self.step.check_committed(compared or self.step.scan, self._verified)
        if committed.repaired:
            self.events.write("repaired", step=self.step.name, **committed.repaired)
        return committed

    def _note_versions(self) -> None:
        """Note that all rows on disk match the manifest as it is now, so that the next attempt need not compare them."""
        versions = self.step.scan.versions
        if self._facts.get("manifest_versions", versions) != versions:
            self._facts["manifest_versions"] = versions
            write_started(self.step.table, self._facts)

    def _shard_metadata(self) -> dict[str, Any]:
        return self.step.shard_metadata(self._facts.get("precision") or self.step.precision)

    def _encoder_metadata(self) -> dict[str, Any]:
        """The metadata once the encoders have reported their precision, which they do before their first block."""
        for _ in range(100):
            self._learn_precision(self.progress.state())
            if self._facts.get("precision"):
                break
            time.sleep(0.1)
        return self._shard_metadata()

    def _learn_precision(self, board: Mapping[str, Any]) -> None:
        """Keep the precision that `auto` became, so that later attempts use the same on any machine."""
        if board["workers"] and not self._facts.get("precision"):
            self._facts["precision"] = next(iter(board["workers"].values()))["precision"]
            write_started(self.step.table, self._facts)

    def _pass(
        self, todo: KeyIndex, rows_per_block: int, careful: bool, prefix: str, precision: str, committed: CommittedRows
    ) -> Written:  # fmt: skip
        step, settings = self.step, self.step.settings
        encoder = replace(
            step.encoder(), region_schema=step.region_schema, precision=precision, batch_size=settings.batch_size,
            device=self.plan.device, threads=self.plan.threads,
        )  # fmt: skip
        if isinstance(encoder, ImageSpec):
            encoder = replace(encoder, limits=replace(encoder.limits, patience=self._patience))
        target = Target(
            step.table, step.rejects, step.schema, step.rejects_schema, prefix, settings.rows_per_file, settings.flush_s,
            step.regions, step.region_schema, step.manifest.spec,
        )  # fmt: skip
        plan = ReadPlan(
            row_groups_with(step.manifest, step.scan, todo), step.manifest.columns(step.keep), todo,
            step.scan.rejected, rows_per_block, careful, step.comparison.contents, step.manifest.layout,
            step.manifest.schema, *(self._lookup or ()),
        )  # fmt: skip

        def observe(written: Written, board: dict[str, Any]) -> None:
            self._learn_precision(board)
            self._verified.update(written.shards)
            self.ticker.observe(committed, written.rows, written.rejects, board)
            self._stop_early(Counter(committed.rejects) + Counter(written.rejects))

        self.ticker.begin_pass(self.progress.known)
        began = time.monotonic()
        try:
            return run_pass(plan, self.plan, encoder, target, self.progress, observe, self._encoder_metadata)
        finally:
            self._streaming_s += time.monotonic() - began
            self.events.write("pass_ended", step=step.name, rows_by_node=self.progress.state()["nodes"])

    def _stop_early(self, reasons: Counter[str]) -> None:
        """Raises RejectRateError where so many rows are rejected for good that no later pass can bring the rate below the limit."""
        counted = self._counted(reasons)
        lasting = sum(counted.values()) - (passing(counted) if self.step.retry else 0)
        if lasting >= STOP_EARLY_REJECTS and lasting > self.step.settings.max_reject_rate * self.step.total:
            raise self._too_many(reasons)

    def _counted(self, reasons: Mapping[str, int]) -> dict[str, int]:
        """The rejects that count towards `max_reject_rate`, by reason."""
        excused = self.step.manifest.layout.excused
        return {reason: count for reason, count in reasons.items() if reason not in excused}

    def _are_too_many(self, reasons: Mapping[str, int]) -> bool:
        return sum(self._counted(reasons).values()) > self.step.settings.max_reject_rate * self.step.total

    def _reject_the_dead(self, committed: CommittedRows, prefix: str) -> None:
        """Reject the rows that were alone, twice, when their worker died."""
        dead = step_rows(self.step, self.step.scan.index.where(~committed.done))
        message = "the worker process died twice while it held this row alone"
        why = {"stage": "encode", "reason": "worker_died", "message": message}
        if dead.num_rows:
            self._write_rejects(f"{prefix}-dead.parquet", [{**row, **why} for row in dead.to_pylist()])

    def _write_rejects(self, name: str, rows: list[dict[str, Any]]) -> None:
        data = pa.Table.from_pylist(rows, schema=self.step.rejects_schema)
        tables.write_shard(self.step.rejects, name, "rejects", data, self._shard_metadata())

    def _check_manifest_rejects(self, committed: CommittedRows) -> None:
        """Raises RejectRateError where the manifest itself has too many rows that cannot be encoded."""
        rejects = self.step.scan.rejects
        if rejects.num_rows:
            self.events.write("manifest_rejects", rows=rejects.num_rows, example=rejects["message"][0].as_py())
        if self._are_too_many(Counter(rejects["reason"].to_pylist())):
            raise self._too_many(committed.rejects)

    def _too_many(self, reasons: Mapping[str, int]) -> RejectRateError:
        """What ends a run whose rejects, counted by reason, are more than `max_reject_rate` allows."""
        step, rows = self.step, self.step.total
        reasons = self._counted(reasons)
        rejected = sum(reasons.values())
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
        again = passing(reasons) if step.retry else 0
        passes = f"the same run again tries {again} of them, whose reasons may pass; " if again else ""
        return RejectRateError(
            f"{rejected} of {rows} rows were rejected ({rejected / max(1, rows):.1%}), more than max_reject_rate={step.settings.max_reject_rate:g}: "
            f"{listed}{_example(step)}. All rows written are kept. See {step.rejects.url}; {passes}repair the rows and run with --retry-rejects, or raise max_reject_rate"
        )

    def _commit(self, committed: CommittedRows) -> tables.Record:
        """Write the records of all tables of the step, that of its own table last."""
        step, provenance = self.step, self._shard_metadata()
        versions = step.comparison.facts(step.scan.versions)
        inputs = {"rows": step.total, "digest": step.digest, "manifest": list(step.manifest.urls), **versions}
        if layout := step.manifest.layout.facts:
            inputs["layout"] = layout
        facts = {"inputs": inputs, "provenance": provenance, "rejects_by_reason": committed.rejects}
        step.commit(step.rejects, "rejects", step.rejects_schema, committed.reject_files, **facts)
        if step.regions:
            self._commit_regions(step.regions, committed, provenance)
        return step.commit(
            step.table, step.table_type, step.schema, committed.files, rejects=committed.rejected, **facts,
            summary=step.summarize(committed, provenance),
            workers=list(self.progress.state()["workers"].values()),
            seconds=round(time.monotonic() - self._began, 2),
            rows_per_s=round(self.ticker.encoded / self._streaming_s, 2) if self._streaming_s else 0.0,
        )  # fmt: skip

    def _commit_regions(self, regions: RegionFolders, committed: CommittedRows, provenance: Mapping[str, Any]) -> None:
        reasons = Counter[str]()
        for shard in committed.rejected_box_files:
            reasons.update(tables.read_shard(regions.rejects, shard.name, ["reason"])["reason"].to_pylist())
        clipped = figures_of(regions.table, committed.region_files, clipped=pl.col("clipped").sum())
        facts = {
            "inputs": {"pictures": committed.rows, "digest": self.step.digest},
            "provenance": provenance,
            "rejects_by_reason": dict(reasons),
            "summary": {"boxes_clipped": clipped.get("clipped", 0)},
        }
        schema, rejects = tables.rejects_schema(*IMAGES.named), reasons.total()
        self.step.commit(regions.rejects, "rejects", schema, committed.rejected_box_files, **facts)
        self.step.commit(
            regions.table, "regions", self.step.region_schema, committed.region_files, rejects=rejects, **facts
        )


def _example(step: EncodeStep[Any]) -> str:
    key = step.manifest.spec.key
    for name in tables.shard_names(step.rejects)[:1]:
        row = tables.read_shard(step.rejects, name, [key, "message"]).slice(0, 1).to_pylist()[0]
        return f"; e.g. {row[key]!r}: {row['message']}"
    return ""


def step_rows(step: EncodeStep[Any], wanted: KeyIndex) -> pa.Table:
    """Identity and sources of the wanted rows of the manifest."""
    spec, contents = step.manifest.spec, step.comparison.contents
    names = [*spec.named, *(field.name for field in step.hash_fields)]
    stored = {*spec.named, *(contents.columns if contents else ())}
    columns = [c for c in step.manifest.columns() if c in stored]
    parts = [pa.table({c: pa.array([], pa.string()) for c in names})]
    for row_group in merge_neighbours(row_groups_with(step.manifest, step.scan, wanted), SCAN_ROWS, SCAN_BYTES):
        for read in read_rows(row_group, columns, rows_at_once(row_group), step.manifest.layout, step.manifest.schema):
            here = wanted.positions(read.table[spec.key]) != ABSENT
            here &= ~np.isin(read.numbers, step.scan.rejected.get(row_group.file, ()))
            rows = read.table.filter(pa.array(here))
            if contents:
                rows = rows.append_column(CONTENT_HASH, contents.hashes(rows))
            for name in set(names) - set(rows.column_names):
                rows = rows.append_column(name, pa.nulls(len(rows), pa.string()))
            parts.append(rows.select(names))
    return pa.concat_tables(parts)
