"""The `metrics` table: figures of all steps of a run, a file per step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.storage.folder import Folder

TABLE = "metrics"


@dataclass(frozen=True)
class Metric:
    """A figure: its usual name, value, the part it is of (None: the whole), the rows it rests on."""

    metric: str
    value: float
    group: str | None = None
    n: int | None = None


def write_metrics(output: Folder, step: str, metrics: Iterable[Metric], provenance: dict[str, Any]) -> None:
    """Write the figures of a step in place of its earlier ones, and the table's record anew.

    Args:
        provenance: of the step's own table; the fingerprint of `metrics` is that of no step.
    """
    folder, schema = output.sub(TABLE), tables.arrow_schema("metrics")
    rows = [{"step": step, "metric": m.metric, "value": m.value, "group": m.group, "n": m.n} for m in metrics]
    folder.remove(tables.RECORD)
    metadata = {**provenance, "fingerprint": TABLE, "step_fingerprint": provenance["fingerprint"]}
    tables.write_shard(folder, f"{step}.parquet", "metrics", pa.Table.from_pylist(rows, schema=schema), metadata)
    _commit(folder, {name for name in tables.noted_as_damaged(folder) or () if name != f"{step}.parquet"})


def repair_metrics(output: Folder) -> None:
    """Write the record of the table anew where it is missing or damaged."""
    folder = output.sub(TABLE)
    if tables.shard_names(folder) and tables.record_to_go_on(folder) is None:
        _commit(folder, set(tables.noted_as_damaged(folder) or ()))


def are_damaged(output: Folder, step: str) -> bool:
    """Whether the figures of a step are noted as damaged, so that it must measure again."""
    return f"{step}.parquet" in (tables.noted_as_damaged(output.sub(TABLE)) or ())


def _commit(folder: Folder, damaged: set[str]) -> None:
    """Write the table's record. damaged: files that are left out, and noted, with those that turn out to be."""
    whole, broken = tables.verify_shards(folder, [name for name in tables.shard_names(folder) if name not in damaged])
    names = [name for name in whole if tables.shard_footer(folder, name)[2].get("table") == "metrics"]
    tables.commit(
        folder, "metrics", tables.arrow_schema("metrics"), [whole[name] for name in names],
        fingerprint=TABLE, inputs={}, settings={}, provenance={}, finished_at=tables.now(),
    )  # fmt: skip
    if damaged | broken.keys():
        tables.note_damaged(folder, damaged | broken.keys())
    else:
        folder.remove(tables.DAMAGED)
