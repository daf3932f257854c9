"""The end of a step: the provenance of its tables and their commit records, the pictures' own last."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipray import __version__, tables
from clipray.encoders.resolve import provenance
from clipray.ledger import RegionFolders, Stock
from clipray.settings import Feature
from clipray.steps.embed_images import EmbedStep
from clipray.storage import Folder
from clipray.tables import Shard


def step_provenance(step: EmbedStep, precision: str) -> dict[str, Any]:
    """What made the rows, for the metadata of every shard."""
    made = provenance(step.model)
    return {
        "fingerprint": step.fingerprint,
        "model": {**made["model"], "precision": precision},
        "features": {name: _feature(feature) for name, feature in step.settings.features.items()},
        "decode": step.settings.decode,
        "preprocess": step.settings.preprocess,
        "normalize": step.settings.normalize,
        "versions": {"clipray": __version__, **made["versions"]},
    }


def _feature(feature: Feature) -> dict[str, Any] | str:
    """A feature in a table's provenance: what was set, or the layer where that says it all."""
    said = feature.model_dump(mode="json", exclude_defaults=True, exclude={"layer"})
    return {"layer": feature.layer, **said} if said else feature.layer


def commit_step(step: EmbedStep, stock: Stock, made: dict[str, Any], **figures: Any) -> tables.Record:
    """Write the records of all tables of the step; `figures` are those of the run: `workers`, `seconds`, `rows_per_s`."""
    common: dict[str, Any] = {
        "fingerprint": step.fingerprint,
        "inputs": {"rows": step.scan.rows, "digest": step.scan.digest, "manifest": list(step.manifest.urls)},
        "settings": step.identity,
        "provenance": made,
        "finished_at": now(),
    }
    _commit(step.rejects, "rejects", tables.arrow_schema("rejects"), stock.reject_files, stock.rejects, common)
    if step.regions and step.region_schema:
        _commit_regions(step.regions, step.region_schema, stock, common)
    return _commit(step.table, "images", step.schema, stock.files, stock.rejects, {**common, **figures})


def _commit_regions(folders: RegionFolders, schema: pa.Schema, stock: Stock, common: dict[str, Any]) -> None:
    reasons, clipped = Counter[str](), 0
    for shard in stock.refused_box_files:
        reasons.update(tables.read_shard(folders.rejects, shard.name, ["reason"])["reason"].to_pylist())
    for shard in stock.region_files:
        found = tables.read_shard(folders.table, shard.name, ["clipped"])["clipped"]
        clipped += pc.sum(found.cast(pa.int64())).as_py() or 0
    inputs = {"pictures": sum(shard.rows for shard in stock.files), "digest": common["inputs"]["digest"]}
    common = {**common, "inputs": inputs, "figures": {"boxes_clipped": clipped}}
    refused = tables.arrow_schema("rejects")
    _commit(folders.rejects, "rejects", refused, stock.refused_box_files, dict(reasons), common)
    _commit(folders.table, "regions", schema, stock.region_files, dict(reasons), common)


def _commit(
    folder: Folder, table: str, schema: pa.Schema, files: list[Shard], rejects: dict[str, int], facts: dict[str, Any]
) -> tables.Record:
    """`rejects`: by reason, of the rows that this table, or the one beside it, did not take."""
    record = tables.Record(
        table,
        tables.table_schema(table)["version"],
        {field.name: str(field.type) for field in schema},
        rows=sum(shard.rows for shard in files),
        rejects=0 if table == "rejects" else sum(rejects.values()),
        files=[asdict(shard) for shard in files],
        rejects_by_reason=rejects,
        **facts,
    )
    tables.commit(folder, record)
    return record


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
