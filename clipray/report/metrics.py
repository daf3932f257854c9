"""The figures that the steps of a run measured."""

from __future__ import annotations

import polars as pl

from clipray import tables
from clipray.report.run_tables import RunTables
from clipray.report.section import LeftOut, Section
from clipray.tables.scan import scan_table

FIGURES = 24  # of a step: those of the whole


def metrics_section(run: RunTables) -> Section | LeftOut:
    """Figures of the whole, step by step; figures of parts are only counted."""
    title, folder = "Metrics", run.output.sub("metrics")
    names = [table.name for table in run.tables]
    if tables.read_record(folder) is None:
        return LeftOut(title, "no step measured anything")
    rows = scan_table(folder.url).filter(pl.col("step").is_in(names)).collect()
    steps = {step: members for (step,), members in rows.partition_by("step", as_dict=True).items()}
    if not steps:
        return LeftOut(title, "no step measured anything")
    blocks, only_parts = [], []
    for name in (name for name in names if name in steps):
        whole, parts = (steps[name].filter(pl.col("group").is_null() == is_whole) for is_whole in (True, False))
        if len(whole):
            blocks.append((name, whole.head(FIGURES).to_dicts(), len(parts)))
        else:
            only_parts.append((name, len(parts)))
    return Section("metrics", title, {"blocks": blocks, "only_parts": only_parts})
