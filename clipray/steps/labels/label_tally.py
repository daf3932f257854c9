"""Tables of labels held against what is known: counts, style by style and group by group, one shard after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.analysis import label_figures as lf
from clipray.errors import SchemaError, listed
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


PAIRS = {"known": pl.Int32, "predicted": pl.Int32, "n": pl.UInt32}


@dataclass(eq=False)
class Entry:
    """The labels of one style in one group of rows, counted.

    Attributes:
        ranks: (n,) int8 by row of `truth`: the place of the known label among those given, UNLABELLED, or lf.MISS.
        pairs: rows by the numbers of the known and of the given label, which is null where none of the classes is.
    """

    data_set: str
    style: str
    table: LabelTable
    truth: KnownLabels
    group: int
    codes: np.ndarray  # (n,) int32 by row of `truth`: the number of the known label among the classes, or NONE
    ranks: np.ndarray
    state: lf.Outcomes
    pairs: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PAIRS))

    def add(self, rows: pl.DataFrame) -> None:
        """Count more rows, as `_joined` made them."""
        known, rank = rows["known"].to_numpy(), rows["rank"].to_numpy()
        self.ranks[rows["position"].to_numpy()] = rank
        counted = lf.count(known, rank, rows["probability"].to_numpy(), len(self.table.classes))
        self.state = lf.combine(self.state, counted)
        pairs = pl.concat([self.pairs, rows.group_by("known", "predicted").len("n")])
        self.pairs = pairs.group_by("known", "predicted").agg(pl.col("n").sum())

    def confusion(self) -> pl.DataFrame:
        """Rows of the table `confusion`: known label, given label, rows."""
        classes, pairs = pl.Series(self.table.classes), self.pairs.sort("known", "predicted", nulls_last=True)
        known, predicted = classes.gather(pairs["known"]), classes.gather(pairs["predicted"])
        of_entry = {"data_set": pl.lit(self.data_set), "style": pl.lit(self.style)}
        return pairs.select(**of_entry, label=known, predicted=predicted, n="n")


def open_labels(name: str, output: Folder) -> LabelTable:
    """Raises SchemaError: it is not finished, or no table of labels."""
    folder = output.named(name)
    record = tables.finished(folder, f"labels {name}")
    if record.table != "labels":
        raise SchemaError(f"labels {name}: expected a table of labels, found one of {record.table}")
    labels = tables.read_table(f"{folder.url}_classes", ["label"])["label"].drop_null()
    return LabelTable(name, folder, record, tuple(dict.fromkeys(labels.to_pylist())), int(record.settings["top"]))


def tally(data_set: str, table: LabelTable, truth: KnownLabels, prefix: str | None) -> list[Entry]:
    """Count all styles of a table in all groups of `truth`. prefix: of the groups' names; None: there is one group.

    Raises:
        SchemaError: no row is in both, or known labels are not among the classes, with which.
    """
    number = {name: n for n, name in enumerate(table.classes)}
    of_truth = np.array([number.get(name, NONE) for name in truth.names], np.int32)
    codes = of_truth[truth.codes]
    ranks: dict[str, np.ndarray] = {}
    entries: dict[tuple[int, str], Entry] = {}
    for shard in tables.iter_table(table.folder.url):
        rows = _joined(shard, table, truth, codes)
        for (group, style), members in rows.partition_by("group", "style", as_dict=True).items():
            if (group, style) not in entries:
                name = data_set if prefix is None else prefix + truth.groups[group]
                of_style = ranks.setdefault(style, np.full(len(truth.index), UNLABELLED, np.int8))
                state = lf.empty(len(table.classes))
                entries[group, style] = Entry(name, style, table, truth, group, codes, of_style, state)
            entries[group, style].add(members)
    if not entries:
        raise SchemaError(f"{truth.source}: no row of {table.folder.url} has a known label there")
    return [entries[key] for key in sorted(entries)]


def _joined(shard: pa.Table, table: LabelTable, truth: KnownLabels, codes: np.ndarray) -> pl.DataFrame:
    """The rows of a shard that have a known label, with their positions in `truth` and what is known of them.

    Raises:
        SchemaError: a known label is not among the classes.
    """
    positions, classes = truth.places(shard), pa.array(table.classes, pa.string())
    rows, positions = shard.filter(pa.array(positions != NONE)), positions[positions != NONE]
    _refuse_unknown(table, truth, positions, codes)
    known = codes[positions]
    return pl.DataFrame(
        {
            "style": pl.Series(rows["style"]).cast(pl.String),
            "position": positions,
            "group": truth.group_codes[positions],
            "known": known,
            "predicted": pl.Series(pc.index_in(rows["label"], classes)),
            "rank": _ranks(rows["top"], classes, known),
            "probability": pl.Series(rows["probability"]),
        }
    )


def _refuse_unknown(table: LabelTable, truth: KnownLabels, positions: np.ndarray, codes: np.ndarray) -> None:
    strange = positions[codes[positions] == NONE]
    if len(strange):
        names = listed([truth.names[code] for code in np.unique(truth.codes[strange])])
        raise SchemaError(
            f"{truth.source}: labels that are not among the {len(table.classes)} classes of {table.name}: {names}"
        )


def _ranks(top: pa.ChunkedArray, classes: pa.Array, codes: np.ndarray) -> np.ndarray:
    """(n,) int8: the place of each row's class in its list, from 0, or MISS."""
    lists = top.combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    listed = pc.index_in(lists.flatten().field("label"), classes).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    ranks = np.full(len(lengths), lf.MISS, np.int8)
    hit = listed == codes[row]
    ranks[row[hit]] = np.minimum(place[hit], lf.MISS - 1)
    return ranks
