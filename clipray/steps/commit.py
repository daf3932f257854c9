"""The end of a step: the provenance of its tables and their commit records, the pictures' own last."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipray import __version__, tables
from clipray.encoders.resolve import provenance
from clipray.ledger import RegionFolders, Stock
from clipray.settings import Feature
from clipray.steps.embed_images import EmbedStep


def step_provenance(step: EmbedStep, precision: str) -> dict[str, Any]:
    """What made the rows, for the metadata of every shard."""
    made = provenance(step.model)
    return {
        "fingerprint": step.fingerprint,
        "name": step.name,
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
        "finished_at": tables.now(),
    }
    refused = tables.arrow_schema("rejects")
    tables.finish(step.rejects, "rejects", refused, stock.reject_files, rejects_by_reason=stock.rejects, **common)
    if step.regions and step.region_schema:
        _commit_regions(step.regions, step.region_schema, stock, common)
    common["rejects_by_reason"] = stock.rejects
    return tables.finish(step.table, "images", step.schema, stock.files, rejects=stock.rejected, **common, **figures)


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
    common["rejects_by_reason"] = dict(reasons)
    tables.finish(folders.rejects, "rejects", refused, stock.refused_box_files, **common)
    tables.finish(folders.table, "regions", schema, stock.region_files, rejects=sum(reasons.values()), **common)
