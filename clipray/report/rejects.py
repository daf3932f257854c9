"""Rejected rows: how many for which reason, and some of each."""

from __future__ import annotations

from typing import Any

import polars as pl

from clipray import tables
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section

SAMPLES = 40
PER_REASON = 6


def rejects_section(run: RunTables) -> Section | LeftOut:
    """Rejected rows by reason, and some of each."""
    counts: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for table in run.tables:
        reasons = table.record.rejects_by_reason
        if not reasons or not table.record.rejects:
            continue
        most, total = max(reasons.values()), table.record.rows + table.record.rejects
        counts += [
            {"table": table.name, "reason": reason, "n": n, "share": n / most, "of": n / max(total, 1)}
            for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        ]
        samples += _samples(run, table)
    if not counts:
        return LeftOut("Rejected rows", "no row was rejected")
    total = sum(row["n"] for row in counts)
    values = {"counts": counts, "samples": samples[:SAMPLES], "total": total}
    return Section("rejects", "Rejected rows", values, tuple(dict.fromkeys(row["table"] for row in counts)))


def _samples(run: RunTables, table: RunTable) -> list[dict[str, Any]]:
    """The first rejects of each reason."""
    folder, counts = run.output.sub(f"rejects/{table.name}"), table.record.rejects_by_reason
    samples: dict[str, list[dict[str, Any]]] = {}
    for name in tables.shard_names(folder):
        if all(len(samples.get(reason, ())) >= min(n, PER_REASON) for reason, n in counts.items()):
            break
        rows = pl.DataFrame(tables.read_shard(folder, name))
        columns = [column for column in rows.columns if column not in ("stage", "reason", "message")]
        for row in rows.group_by("reason", maintain_order=True).head(PER_REASON).iter_rows(named=True):
            of_reason = samples.setdefault(row["reason"], [])
            if len(of_reason) < PER_REASON:
                named = [(column, row[column]) for column in columns if row[column] is not None]
                why = {name: row[name] for name in ("stage", "reason", "message")}
                of_reason.append({"table": table.name, "named": named, **why})
    return [row for rows in samples.values() for row in rows]
