"""What ran: a line for each table, the models and versions that made them, and the settings of each step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from clipray import tables
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import Headline, Section
from clipray.storage.uris import is_local

SETTINGS_BYTES = 4_000  # of a table's settings as text
ALL_SETTINGS_BYTES = 80_000
TABLES = 200


@dataclass(frozen=True)
class Line:
    """A table of the run. beside: whether a step wrote it beside its own; settings: what decided its values, as text."""

    name: str
    what: str
    rows: int
    rejects: int
    seconds: float
    rate: float
    finished: str
    settings: str
    beside: bool = False


def ran_section(run: RunTables) -> Section:
    """Tables with their rows, rejects and rates; models; versions; workers."""
    shown, room = run.tables[:TABLES], ALL_SETTINGS_BYTES
    lines: list[Line] = []
    for table in shown:
        beside = any(table.name.startswith(f"{line.name}_") for line in lines)
        line = _line(table, 0 if beside else min(room, SETTINGS_BYTES), beside)
        room -= len(line.settings)
        lines.append(line)
    values = {
        "lines": lines, "absent": run.absent, "more": len(run.tables) - len(shown), "models": _models(run),
        "versions": _versions(run), "workers": _workers(run), "output": _brief(run.output.url, 2),
    }  # fmt: skip
    return Section("ran", "What ran", values, tuple(table.name for table in shown), _headlines(run))


def _line(table: RunTable, room: int, beside: bool) -> Line:
    record = table.record
    text = json.dumps(record.settings, indent=1, ensure_ascii=False) if record.settings and not beside else ""
    text = text if len(text) <= room else f"{text[: max(room, 0)]}…"
    return Line(
        table.name, _what(table), record.rows, record.rejects, record.seconds, record.rows_per_s, record.finished_at,
        text, beside,
    )  # fmt: skip


def _what(table: RunTable) -> str:
    """What it holds, in the words of its schema, before the first stop."""
    doc = str(tables.table_schema(table.kind)["doc"]).replace("One row per", "a row for each", 1)
    doc = doc.split(". ")[0].split(":")[0].split(";")[0].rstrip(".")
    return doc[:1].lower() + doc[1:]


def _headlines(run: RunTables) -> tuple[Headline, ...]:
    firsts = [table for table in run.tables if table.kind in ("images", "texts")]
    found = [(f"{table.record.rows:,}", f"rows of {table.name}") for table in firsts[:2]]
    rejects = sum(table.record.rejects for table in run.tables)
    return (*found, (f"{rejects:,}", "rows rejected"))


def _models(run: RunTables) -> list[list[tuple[str, str]]]:
    """What is known of each model that made vectors or scores, with the tables that it made."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for table in run.tables:
        model = table.record.provenance.get("model")
        if isinstance(model, dict) and "name" in model and table.kind != "index":
            said = found.setdefault(f"{model['name']} {model.get('weights')}", (model, []))[1]
            said.append(f"{table.name} ({model['precision']})" if model.get("precision") else table.name)
    return [[*_facts(model), ("made", ", ".join(names))] for model, names in found.values()]


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
    """The last parts of a local path, a URL as it is: a page is shown to people who know nothing of this machine."""
    return place if not is_local(place) else "/".join(place.split("/")[-parts:])


def _versions(run: RunTables) -> list[tuple[str, str]]:
    """Of each program all versions that made a table."""
    found: dict[str, set[str]] = {}
    for table in run.tables:
        for name, version in dict(table.record.provenance.get("versions") or {}).items():
            found.setdefault(str(name), set()).add(str(version))
    return [(name, ", ".join(sorted(versions))) for name, versions in sorted(found.items())]


def _workers(run: RunTables) -> list[tuple[str, str]]:
    """By table the machines that encoded: how many workers, on what."""
    found = []
    for table in run.tables:
        kinds = Counter(f"{w.get('device', '?')}, {w.get('precision', '?')}" for w in table.record.workers)
        if kinds:
            hosts = len({w.get("host") for w in table.record.workers})
            said = "; ".join(f"{n} on {kind}" for kind, n in kinds.items())
            found.append((table.name, f"{said}; {hosts} machine{'s' if hosts != 1 else ''}"))
    return found
