"""The sections on the run: its tables, models, versions and settings; its metrics; its rejected rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import polars as pl

from clipray import tables
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import Headline, LeftOut, Section
from clipray.storage.uris import is_local
from clipray.tables.scan import scan_table

SETTINGS_BYTES = 4_000  # of a table's settings as text
ALL_SETTINGS_BYTES = 80_000
TABLES = 200
FIGURES = 24  # of a step: those of the whole
SAMPLES = 40  # of rejected rows
PER_REASON = 6


@dataclass(frozen=True)
class Line:
    """A table of the run. settings: what decided its values, as text; is_companion: of another step's table."""

    table: RunTable
    what: str
    settings: str
    is_companion: bool


def ran_section(run: RunTables) -> Section:
    """Tables with their rows, rejects and rates; models; versions; workers."""
    shown, room = run.tables[:TABLES], ALL_SETTINGS_BYTES
    lines: list[Line] = []
    for table in shown:
        is_companion = any(table.name.startswith(f"{line.table.name}_") for line in lines)
        settings = "" if is_companion else _settings(table, min(room, SETTINGS_BYTES))
        room -= len(settings)
        lines.append(Line(table, _what(table), settings, is_companion))
    values = {
        "lines": lines, "absent": run.absent, "more": len(run.tables) - len(shown), "models": _models(run),
        "versions": _versions(run), "workers": _workers(run), "output": _brief(run.output.url, 2),
    }  # fmt: skip
    return Section("ran", "What ran", values, tuple(table.name for table in shown), _headlines(run))


def _settings(table: RunTable, room: int) -> str:
    text = json.dumps(table.record.settings, indent=1, ensure_ascii=False) if table.record.settings else ""
    return text if len(text) <= room else f"{text[: max(room, 0)]}…"


def _what(table: RunTable) -> str:
    """What it holds: the first sentence of its schema."""
    doc = str(tables.table_schema(table.type)["doc"]).replace("One row per", "a row for each", 1)
    doc = doc.split(". ")[0].split(":")[0].split(";")[0].rstrip(".")
    return doc[:1].lower() + doc[1:]


def _headlines(run: RunTables) -> tuple[Headline, ...]:
    firsts = [table for table in run.tables if table.type in ("images", "texts")]
    rows = [(f"{table.record.rows:,}", f"rows of {table.name}") for table in firsts[:2]]
    rejects = sum(table.record.rejects for table in run.tables)
    return (*rows, (f"{rejects:,}", "rows rejected"))


def _models(run: RunTables) -> list[list[tuple[str, str]]]:
    """What is known of each model that made vectors or scores, with the tables that it made."""
    models: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for table in run.tables:
        model = table.record.provenance.get("model")
        if isinstance(model, dict) and "name" in model and table.type != "index":
            names = models.setdefault(f"{model['name']} {model.get('weights')}", (model, []))[1]
            names.append(f"{table.name} ({model['precision']})" if model.get("precision") else table.name)
    return [[*_facts(model), ("made", ", ".join(names))] for model, names in models.values()]


def _facts(model: dict[str, Any]) -> list[tuple[str, str]]:
    seen = dict(model.get("preprocess") or {})
    size = " × ".join(map(str, seen.get("size") or ()))
    facts = {
        "model": model["name"],
        "checkpoint": _brief(str(model.get("pretrained") or ""), 1),
        "weights": model.get("weights"),
        "sees": f"{size} px, {seen.get('resize_mode')}, {seen.get('interpolation')}" if size else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _brief(place: str, parts: int) -> str:
    """The last parts of a local path; a URL as it is. Readers of the page do not know this machine."""
    return place if not is_local(place) else "/".join(place.split("/")[-parts:])


def _versions(run: RunTables) -> list[tuple[str, str]]:
    """All versions of each program that made a table."""
    versions: dict[str, set[str]] = {}
    for table in run.tables:
        for name, version in dict(table.record.provenance.get("versions") or {}).items():
            versions.setdefault(str(name), set()).add(str(version))
    return [(name, ", ".join(sorted(of_name))) for name, of_name in sorted(versions.items())]


def _workers(run: RunTables) -> list[tuple[str, str]]:
    """The workers that encoded each table: how many, on which device."""
    lines = []
    for table in run.tables:
        workers = Counter(f"{w.get('device', '?')}, {w.get('precision', '?')}" for w in table.record.workers)
        if workers:
            hosts = len({w.get("host") for w in table.record.workers})
            counts = "; ".join(f"{n} on {device}" for device, n in workers.items())
            lines.append((table.name, f"{counts}; {hosts} machine{'s' if hosts != 1 else ''}"))
    return lines


def metrics_section(run: RunTables) -> Section | LeftOut:
    """Metrics of each step as a whole. Metrics of groups are only counted."""
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
    folder, counts = tables.rejects_of(run.output, table.name), table.record.rejects_by_reason
    enough, rows = sum(min(n, PER_REASON) for n in counts.values()), pl.DataFrame()
    for name in tables.shard_names(folder):
        rows = pl.concat([rows, pl.DataFrame(tables.read_shard(folder, name))], how="diagonal")
        rows = rows.group_by("reason", maintain_order=True).head(PER_REASON)
        if len(rows) == enough:
            break
    ids = [column for column in rows.columns if column not in ("stage", "reason", "message")]
    return [
        {"table": table.name, "named": [(name, row[name]) for name in ids if row[name] is not None], **row}
        for row in rows.iter_rows(named=True)
    ]
