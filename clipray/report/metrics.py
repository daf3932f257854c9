"""The figures that the steps of a run measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.report.run_tables import RunTables
from clipray.report.section import LeftOut, Section

FIGURES = 24  # of a step: those of the whole


def metrics_section(run: RunTables) -> Section | LeftOut:
    """Figures of the whole, step by step; figures of parts are only counted."""
    title, folder = "Metrics", run.output.sub("metrics")
    names = {table.name for table in run.tables}
    found: dict[str, list[dict[str, Any]]] = {}
    parts: Counter[str] = Counter()
    present = tables.read_record(folder) is not None
    for part in tables.iter_table(folder.url) if present else ():
        own = part.filter(pc.is_in(part["step"], pa.array(sorted(names), pa.string())))
        whole = own.filter(pc.is_null(own["group"]))
        parts.update(own.filter(pc.is_valid(own["group"]))["step"].to_pylist())
        for row in whole.slice(0, FIGURES).to_pylist():
            found.setdefault(row["step"], []).append(row)
    steps = [name for name in (table.name for table in run.tables) if name in found or parts[name]]
    if not steps:
        return LeftOut(title, "no step measured anything")
    blocks = [(name, found[name], parts[name]) for name in steps if found.get(name)]
    only_parts = [(name, parts[name]) for name in steps if not found.get(name)]
    return Section("metrics", title, {"blocks": blocks, "only_parts": only_parts})
