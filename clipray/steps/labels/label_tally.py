"""Tables of labels held against what is known: counts, style by style and group by group, one shard after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.analysis import label_figures as lf
from clipray.errors import SchemaError
from clipray.inputs.known_labels import NONE, KnownLabels
from clipray.storage.folder import Folder

UNLABELLED = -1  # in `Entry.ranks`


@dataclass(frozen=True)
class LabelTable:
    """An opened table of labels.

    Attributes:
        classes: all that it can give, in order. top: how many it gives of each row.
    """

    name: str
    folder: Folder
    record: tables.Record
    classes: tuple[str, ...]
    top: int

    @property
    def tops(self) -> tuple[int, ...]:
        """Of which accuracies can be told."""
        return tuple(top for top in lf.TOPS if top <= self.top or len(self.classes) <= self.top)


@dataclass(eq=False)
class Entry:
    """The labels of one style in one group of rows, counted.

    Attributes:
        ranks: (n,) int8 by row of `truth`: the place of the known label among those given, UNLABELLED, or lf.MISS.
        pairs: rows by `known * (k + 1) + given`, given = k where none is.
    """

    data_set: str
    style: str
    table: LabelTable
    truth: KnownLabels
    group: int
    codes: np.ndarray  # (n,) int32 by row of `truth`: the number of the known label among the classes, or NONE
    ranks: np.ndarray
    state: lf.Outcomes
    pairs: dict[int, int] = field(default_factory=dict)

    def pairs_rows(self) -> Iterator[tuple[str, str | None, int]]:
        """Known label, given label, rows."""
        k = len(self.table.classes)
        for pair, n in sorted(self.pairs.items()):
            known, given = divmod(pair, k + 1)
            yield self.table.classes[known], self.table.classes[given] if given < k else None, n


def open_labels(name: str, output: Folder) -> LabelTable:
    """Raises SchemaError: it is not finished, or no table of labels."""
    folder = output.named(name)
    record = tables.finished(folder, f"labels {name}")
    if record.table != "labels":
        raise SchemaError(f"labels {name}: expected a table of labels, found one of {record.table}")
    beside = tables.read_table(f"{folder.url}_classes", ["label"])["label"]
    return LabelTable(
        name, folder, record, tuple(dict.fromkeys(beside.drop_null().to_pylist())), int(record.settings["top"])
    )


def tally(data_set: str, table: LabelTable, truth: KnownLabels, *, grouped: bool) -> list[Entry]:
    """Count all styles of a table in all groups of `truth`.

    Raises:
        SchemaError: no row is in both, or known labels are not among the classes, with which.
    """
    number = {name: n for n, name in enumerate(table.classes)}
    of_truth = np.array([number.get(name, NONE) for name in truth.names], np.int32)
    codes, classes = of_truth[truth.codes], pa.array(table.classes, pa.string())
    ranks: dict[str, np.ndarray] = {}
    found: dict[tuple[int, str], Entry] = {}
    for part in tables.iter_table(table.folder.url):
        at = truth.places(part)
        rows, at = part.filter(pa.array(at != NONE)), at[at != NONE]
        _refuse_unknown(table, truth, at, codes)
        for style, own in _by(rows["style"].to_numpy()):
            some, here = rows.filter(pa.array(own)), at[own]
            given = pc.fill_null(pc.index_in(some["label"], classes), len(table.classes)).to_numpy()
            places = _ranks(some["top"], classes, codes[here])
            ranks.setdefault(style, np.full(len(truth.keys), UNLABELLED, np.int8))[here] = places
            for group, member in _by(truth.group_codes[here]):
                name = f"{data_set}/{truth.groups[group]}" if grouped else data_set
                state = lf.empty(len(table.classes))
                fresh = Entry(name, style, table, truth, group, codes, ranks[style], state)
                entry = found.setdefault((group, style), fresh)
                p = some["probability"].to_numpy()[member]
                here_codes = codes[here][member]
                counted = lf.count(here_codes, places[member], p, len(table.classes))
                entry.state = lf.combine(entry.state, counted)
                _add(entry.pairs, here_codes.astype(np.int64) * (len(table.classes) + 1) + given[member])
    if not found:
        raise SchemaError(f"{truth.source}: no row of {table.folder.url} has a known label there")
    return [found[key] for key in sorted(found)]


def _refuse_unknown(table: LabelTable, truth: KnownLabels, at: np.ndarray, codes: np.ndarray) -> None:
    strange = at[codes[at] == NONE]
    if len(strange):
        names = [truth.names[code] for code in np.unique(truth.codes[strange])]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise SchemaError(
            f"{truth.source}: labels that are not among the {len(table.classes)} classes of {table.name}: "
            f"{', '.join(map(repr, names[:5]))}{more}"
        )


def _by(values: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Each value, and which rows have it, (n,) bool."""
    for value in np.unique(values):
        yield value, values == value


def _ranks(top: pa.ChunkedArray, classes: pa.Array, codes: np.ndarray) -> np.ndarray:
    """(n,) int8: the place of each row's class in its list, from 0, or MISS."""
    lists = top.combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    given = pc.index_in(lists.flatten().field("label"), classes).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    ranks = np.full(len(lengths), lf.MISS, np.int8)
    hit = given == codes[row]
    ranks[row[hit]] = np.minimum(place[hit], lf.MISS - 1)
    return ranks


def _add(pairs: dict[int, int], values: np.ndarray) -> None:
    for value, n in zip(*(found.tolist() for found in np.unique(values, return_counts=True)), strict=True):
        pairs[value] = pairs.get(value, 0) + n
