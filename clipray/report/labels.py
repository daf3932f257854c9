"""The section on labels: how many rows have each, with examples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from clipray.report.label_source import NO_LABEL, LabelCounts, Labels, count_labels, label_sources
from clipray.report.run_tables import RunTables
from clipray.report.section import LeftOut, Section
from clipray.report.tiles import Album, Tile

TITLE = "Labels"
TABLES = 2  # of labels given, or the known ones alone
LABELS = 16  # of a table: its commonest ones
PER_LABEL = 6  # examples, at most


@dataclass(frozen=True)
class LabelRow:
    """A label. counts: rows that have it, in each column; share: of the first, of its largest."""

    label: str
    counts: list[int]
    share: float
    tiles: list[Tile]


@dataclass(frozen=True)
class Labelling:
    """A table's labels. columns: what is counted; rest: labels that are not listed; too_many: more than are counted;
    others: styles that are not shown."""

    name: str
    columns: list[str]
    rows: list[LabelRow]
    rest: int
    unlabelled: int
    too_many: bool
    predicted: bool
    others: list[str] = field(default_factory=list)


def labels_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """Counts of the labels that a model gave, or else of the known ones."""
    sources = label_sources(run)
    known = next((source for source in sources if source.known), None)
    by_table: dict[str, list[Labels]] = {}
    for source in sources:
        if not source.known:
            by_table.setdefault(source.table.name, []).append(source)
    if not by_table and known is None:
        return LeftOut(TITLE, f"no table of labels, and no column `{run.label}`; a step `label` gives some")
    examples = min(examples, PER_LABEL)
    known_counts = count_labels(known, 0 if by_table else examples) if known else None
    groups = list(by_table.items())[:TABLES]
    shown = [_predicted(name, styles, known_counts, album, examples) for name, styles in groups]
    if not shown and known is not None and known_counts is not None:
        shown = [_labelling(known.table.name, known.ids, ["rows"], [known_counts], album, predicted=False)]
    values = {"labellings": shown, "more": list(by_table)[TABLES:]}
    used = [each.name for each in shown] + ([known.table.name] if known else [])
    return Section("labels", TITLE, values, tuple(dict.fromkeys(used)))


def _predicted(name: str, styles: list[Labels], known: LabelCounts | None, album: Album, examples: int) -> Labelling:
    """The labels of the first style, next to the known ones."""
    first, *others = styles
    counted, columns = [count_labels(first, examples, "probability")], [str(first.style)]
    if known and not known.too_many:
        counted, columns = [*counted, known], [*columns, "known"]
    labelling = _labelling(name, first.ids, columns, counted, album, predicted=True)
    return replace(labelling, others=[str(style.style) for style in others])


def _labelling(
    name: str, ids: tuple[str, ...], columns: list[str], counted: list[LabelCounts], album: Album, *, predicted: bool
) -> Labelling:
    first = counted[0]
    counts = {label: n for label, n in first.counts.items() if label != NO_LABEL}
    if any(each.too_many for each in counted):
        return Labelling(name, columns, [], len(counts), first.counts[NO_LABEL], True, predicted)
    commonest = sorted(counts, key=lambda label: (-counts[label], label))[:LABELS]
    most = max(counts.values(), default=1)
    rows = [
        LabelRow(
            label, [each.counts[label] for each in counted], counts[label] / most,
            [_tile(album, ids, row, label if predicted else None) for row in first.examples.get(label, [])],
        )
        for label in commonest
    ]  # fmt: skip
    return Labelling(name, columns, rows, len(counts) - len(rows), first.counts[NO_LABEL], False, predicted)


def _tile(album: Album, ids: tuple[str, ...], row: dict[str, object], predicted: str | None) -> Tile:
    p = row.get("probability")
    return album.tile(
        {name: str(row[name]) for name in ids}, f"{p:.0%}" if isinstance(p, float) else "", predicted=predicted
    )
