"""The end of a step: the provenance of its tables and their commit records, the pictures' own last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.inputs.committed_rows import CommittedRows, RegionFolders
from clipray.job.row_spec import PICTURES
from clipray.steps.base.encode_step import EncodeStep


def commit_step(step: EncodeStep[Any], stock: CommittedRows, made: dict[str, Any], **figures: Any) -> tables.Record:
    """Write the records of all tables of the step; `figures` are those of the run: `workers`, `seconds`, `rows_per_s`."""
    versions = step.comparison.facts(step.scan.versions)
    common: dict[str, Any] = {
        "fingerprint": step.fingerprint,
        "inputs": {"rows": step.scan.rows, "digest": step.digest, "manifest": list(step.manifest.urls), **versions},
        "settings": step.identity,
        "provenance": made,
        "finished_at": tables.now(),
    }
    tables.finish(
        step.rejects, "rejects", step.rejects_schema, stock.reject_files, rejects_by_reason=stock.rejects, **common
    )
    if step.regions and step.region_schema:
        _commit_regions(step.regions, step.region_schema, stock, common)
    common["rejects_by_reason"] = stock.rejects
    figures = {"figures": step.figures(stock, made), **figures}
    kind = step.manifest.kind.table
    return tables.finish(step.table, kind, step.schema, stock.files, rejects=stock.rejected, **common, **figures)


def _commit_regions(folders: RegionFolders, schema: pa.Schema, stock: CommittedRows, common: dict[str, Any]) -> None:
    reasons, clipped = Counter[str](), 0
    for shard in stock.refused_box_files:
        reasons.update(tables.read_shard(folders.rejects, shard.name, ["reason"])["reason"].to_pylist())
    for shard in stock.region_files:
        found = tables.read_shard(folders.table, shard.name, ["clipped"])["clipped"]
        clipped += pc.sum(found.cast(pa.int64())).as_py() or 0
    inputs = {"pictures": sum(shard.rows for shard in stock.files), "digest": common["inputs"]["digest"]}
    common = {**common, "inputs": inputs, "figures": {"boxes_clipped": clipped}}
    common["rejects_by_reason"] = dict(reasons)
    refused = tables.rejects_schema(*PICTURES.named)
    tables.finish(folders.rejects, "rejects", refused, stock.refused_box_files, **common)
    tables.finish(folders.table, "regions", schema, stock.region_files, rejects=sum(reasons.values()), **common)
