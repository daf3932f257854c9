"""The section on labels: how many rows have each, with examples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

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
    others: list[str]


def labels_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """Counts of the labels that a model gave, or else of the known ones."""
    sources = label_sources(run)
    known = next((source for source in sources if source.known), None)
    predicted = (source for source in sources if not source.known)
    by_table = {name: list(styles) for name, styles in groupby(predicted, lambda source: source.table.name)}
    if not by_table and known is None:
        return LeftOut(TITLE, f"no table of labels, and no column `{run.label}`; a step `label` gives some")
    examples = min(examples, PER_LABEL)
    known_counts = count_labels(known, 0 if by_table else examples) if known else None
    comparable = [("known", known_counts)] if known_counts and not known_counts.too_many else []
    labellings = []
    for first, *others in list(by_table.values())[:TABLES]:  # the labels of the first style, next to the known ones
        counted = [(str(first.style), count_labels(first, examples, "probability")), *comparable]
        labellings.append(_labelling(first, [str(other.style) for other in others], counted, album))
    if not labellings and known and known_counts:
        labellings = [_labelling(known, [], [("rows", known_counts)], album)]
    values = {"labellings": labellings, "more": list(by_table)[TABLES:]}
    used = [each.name for each in labellings] + ([known.table.name] if known else [])
    return Section("labels", TITLE, values, tuple(dict.fromkeys(used)))


def _labelling(source: Labels, others: list[str], counted: list[tuple[str, LabelCounts]], album: Album) -> Labelling:
    """counted: by column; the first has the examples, of which `source` is the column of labels."""
    first, predicted = counted[0][1], not source.known
    counts = {label: n for label, n in first.counts.items() if label != NO_LABEL}
    too_many = any(each.too_many for _, each in counted)
    commonest = [] if too_many else sorted(counts, key=lambda label: (-counts[label], label))[:LABELS]
    most = max(counts.values(), default=1)
    rows = [
        LabelRow(
            label, [each.counts[label] for _, each in counted], counts[label] / most,
            [_tile(album, source.ids, row, label if predicted else None) for row in first.examples.get(label, [])],
        )
        for label in commonest
    ]  # fmt: skip
    columns, rest = [column for column, _ in counted], len(counts) - len(rows)
    return Labelling(source.table.name, columns, rows, rest, first.counts[NO_LABEL], too_many, predicted, others)


def _tile(album: Album, ids: tuple[str, ...], row: dict[str, object], predicted: str | None) -> Tile:
    p = row.get("probability")
    return album.tile(
        {name: str(row[name]) for name in ids}, f"{p:.0%}" if isinstance(p, float) else "", predicted=predicted
    )
