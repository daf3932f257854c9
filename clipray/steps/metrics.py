"""The `metrics` table: figures of all steps of a run, a file per step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.storage import Folder

TABLE = "metrics"


@dataclass(frozen=True)
class Metric:
    """A figure: its usual name, value, the part it is of (None: the whole), the rows it rests on."""

    metric: str
    value: float
    group: str | None = None
    n: int | None = None


def write_metrics(output: Folder, step: str, found: Iterable[Metric], provenance: dict[str, Any]) -> None:
    """Write the figures of a step in place of its earlier ones, and the table's record anew.

    Args:
        provenance: of the step's own table; the fingerprint of `metrics` is that of no step.
    """
    folder, schema = output.sub(TABLE), tables.arrow_schema("metrics")
    rows = [{"step": step, "metric": m.metric, "value": m.value, "group": m.group, "n": m.n} for m in found]
    folder.remove(tables.RECORD)
    made = {**provenance, "fingerprint": TABLE, "step_fingerprint": provenance["fingerprint"]}
    tables.write_shard(folder, f"{step}.parquet", "metrics", pa.Table.from_pylist(rows, schema=schema), made)
    sizes = folder.sizes()
    files = [
        tables.Shard(name, tables.shard_stamp(folder, name)[0], sizes[name]) for name in tables.shard_names(folder)
    ]
    tables.finish(
        folder, "metrics", schema, files,
        fingerprint=TABLE, inputs={}, settings={}, provenance={}, finished_at=tables.now(),
    )  # fmt: skip
