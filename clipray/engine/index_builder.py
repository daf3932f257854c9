"""What index to build, and the actor that holds it: merges its parts, measures its recall, writes it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipray.analysis import vector_index as vi
from clipray.analysis.recall import TOPS, Nearest, Queries, best_of, query_ms, recalls, tune
from clipray.inputs.index_reader import read_faiss
from clipray.inputs.vector_column import VectorColumn
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup

OURS = re.compile(r"(\d{6,}|index-[0-9a-f]{8})\.faiss(\.lists)?")  # files of a build
QUERIES = 1_000  # that recall is measured with, at most
HELD_SHARE = 0.1  # of the rows that are held out, at most
FEWEST = 100  # new rows of an index that grows: with fewer nothing is measured


@dataclass(frozen=True)
class IndexPart:
    """Neighbouring row groups; their rows are `first_row`, `first_row` + 1, … of all.

    Attributes:
        numbers: of a part that is in the index: the shard that has its rows' numbers there, and where they begin in it.
    """

    row_groups: list[RowGroup]
    first_row: int
    numbers: tuple[str, int] | None = None

    @property
    def new(self) -> bool:
        return self.numbers is None

    @property
    def rows(self) -> int:
        return sum(row_group.rows for row_group in self.row_groups)


@dataclass(frozen=True)
class IndexSpec:
    """What to build.

    Attributes:
        index_type: factory string. parts: of all rows; tasks fill those that are new.
        queries: whose recall should reach `recall`; None: that of the rows that are held out.
        grown_from: file of an index in the folder, to which the new parts are added.
        on_disk: lists are merged on disk, beside the index.
    """

    source: VectorColumn
    index_type: str
    metric: str
    recall: float
    random_state: int
    parts: list[IndexPart]
    folder: Folder
    name: str
    queries: VectorColumn | None = None
    grown_from: str | None = None
    on_disk: bool = False

    @property
    def n_held_out(self) -> int:
        """How many rows are held out: of an index that grows new ones, and none where they are too few to tell anything."""
        rows, new = self.source.n_samples, sum(part.rows for part in self.parts if part.new)
        if rows < 2 or not vi.extendable(vi.empty_index(self.index_type, self.source.n_features, self.metric)):
            return 0
        wanted = min(QUERIES, max(1, int(HELD_SHARE * rows)))
        return min(wanted, new) if new == rows or new >= min(wanted, FEWEST) else 0


@dataclass(frozen=True, eq=False)
class Probes:
    """What recall is measured with.

    Attributes:
        held_out: (h,) int64, the rows that are held out, ascending. x: (h, d) float32, their vectors.
        others: (q, d) float32, of `IndexSpec.queries`.
        rows: of the table, which has that many numbers.
    """

    held_out: np.ndarray
    x: np.ndarray
    others: np.ndarray
    rows: int

    def numbers(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (n,) int64 in the index of new rows (n,), and which of them (n,) bool are held out: these come last."""
        before, last = np.searchsorted(self.held_out, rows), self.rows - len(self.held_out)
        held_out = np.isin(rows, self.held_out)
        return np.where(held_out, last + before, rows - before), held_out


class Builder:
    """An actor that holds the index."""

    def __init__(self, order: IndexSpec, threads: int) -> None:
        self._order, self._threads = order, threads
        self._parts: list[Path] = []
        self._nearest: list[Nearest] = []
        self._index: Any = None
        self._trained_on = 0

    def begin(self, trained: np.ndarray, trained_on: int, probes: Probes) -> np.ndarray:
        """The empty index that parts are filled in, as bytes: `trained`, or of the kind that is extended.

        Comes first, in place of a constructor that fails: of an error there Ray hands on the text alone.
        """
        import faiss

        faiss.omp_set_num_threads(self._threads)
        self._faiss, self._aside = faiss, _aside(self._order.folder)
        self._trained_on, self._probes = trained_on, probes
        if self._order.grown_from is None:
            self._index = self._faiss.deserialize_index(trained)
        else:
            folder, grown_from = self._order.folder, self._order.grown_from
            path = folder.path(grown_from)
            if not folder.local:
                path = str(self._aside / grown_from)
                folder.fs.get_file(folder.path(grown_from), path)
            self._index = read_faiss(path)
            empty = self._faiss.clone_index(self._index)
            empty.reset()
            trained = self._faiss.serialize_index(empty)
        self._empty, self._last = trained, self._held_out(trained)
        self._sizes: Any = None if self._last is None else vi.list_sizes(self._last)
        return trained

    def _held_out(self, trained: np.ndarray) -> Any:
        """The part of the rows that are held out; None where parts are not merged."""
        part, probes = self._faiss.deserialize_index(trained), self._probes
        if not vi.mergeable(part):
            return None
        if len(probes.x):
            vi.fill(part, probes.x, probes.rows - len(probes.x))
        return part

    def merge(self, part: np.ndarray | None, nearest: Nearest, number: int) -> None:
        """Parts come in the order of their rows."""
        self._nearest = [best_of([*self._nearest, nearest], max(TOPS))]
        if part is None:
            return
        if not vi.mergeable(self._index):
            vi.fill(self._index, part, self._index.ntotal)
        elif self._sizes is None:
            self._index.merge_from(self._faiss.deserialize_index(part), 0)
        else:
            self._sizes = self._sizes + vi.list_sizes(self._faiss.deserialize_index(part))
            self._keep(part, number)

    def _keep(self, part: np.ndarray, number: int) -> None:
        self._parts.append(self._aside / f"{number:06d}.faiss")
        self._parts[-1].write_bytes(part.data)

    def _merge_lists(self) -> None:
        """Of the parts, which wait on disk until it is known how long each list becomes: lists that grow take twice the room."""
        if self._order.on_disk:
            self._merge_on_disk()
            return
        vi.reserve(self._index, self._sizes + vi.list_sizes(self._index))
        for part in self._parts:
            self._index.merge_from(self._faiss.read_index(str(part)), 0)
            part.unlink()

    def _merge_on_disk(self) -> None:
        from faiss.contrib.ondisk import merge_ondisk

        lists = self._aside / f"{self._order.name}.lists"
        self._index = self._faiss.deserialize_index(self._empty)
        lists.unlink(missing_ok=True)
        merge_ondisk(self._index, list(map(str, self._parts)), str(lists))

    def _add_held_out(self) -> None:
        if not len(self._probes.x):
            return
        if self._last is None:
            vi.fill(self._index, self._probes.x, self._index.ntotal)
        elif self._order.on_disk:  # faiss 1.15 mixes up lists on disk that grow
            self._keep(self._faiss.serialize_index(self._last), len(self._order.parts))
            self._merge_on_disk()
        else:
            self._index.merge_from(self._last, 0)

    def finish(self) -> dict[str, Any]:
        """Tune, add the rows that are held out, write the file, and say what is in it."""
        order, name = self._order, self._order.name
        if self._parts:
            self._merge_lists()
        measured = self._measured()
        self._add_held_out()
        vi.set_effort(self._index, measured.get("parameter", ""), measured.get("value", 0))
        figures: dict[str, Any] = {"type": order.index_type, "vectors": int(self._index.ntotal), **measured}
        if order.grown_from is None:
            figures["trained_on"] = self._trained_on
        path = self._aside / name
        self._faiss.write_index(self._index, str(path))
        files = [path, *self._aside.glob(f"{name}.lists")]
        figures["files"] = {file.name: file.stat().st_size for file in files}
        for file in files:
            _publish(file, order.folder)
        _clear(self._aside)
        return figures

    def _measured(self) -> dict[str, Any]:
        """Recall for the rows that are held out and for `IndexSpec.queries`, tuned for the latter where there are any."""
        order, probes, metric = self._order, self._probes, self._order.metric
        (nearest,), count = self._nearest, len(probes.x)
        held_out = Queries(probes.x, nearest.of(slice(count)))
        others = Queries(probes.others, nearest.of(slice(count, None)))
        target = others if len(others.x) else held_out
        if not len(target.x) or not nearest.top:
            return {}
        parameter, value = tune(self._index, target, metric, order.recall)
        figures: dict[str, Any] = {"parameter": parameter, "value": value}
        figures["query_ms"] = query_ms(self._index, target.x)
        if count:
            figures |= {**recalls(self._index, held_out, metric), "held_out": count}
        if order.queries:
            seen = recalls(self._index, others, metric)
            figures["queries"] = {"input": order.queries.name, "n": len(others.x), **seen}
        return figures


def _aside(folder: Folder) -> Path:
    """An empty folder for files that are not finished: on a local disk within `folder`, where a killed build's is found again."""
    if not folder.local:
        return Path(tempfile.mkdtemp(prefix="clipray-index-"))
    aside = Path(folder.path("_building"))
    _clear(aside)
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def _clear(aside: Path) -> None:
    """Remove what builds keep in their folder, and the folder itself unless files of somebody else lie there."""
    for file in aside.glob("*"):
        if OURS.fullmatch(file.name):
            file.unlink()
    with contextlib.suppress(OSError):
        aside.rmdir()


def _publish(file: Path, folder: Folder) -> None:
    """Move a finished file into the folder, where it is seen whole or not at all."""
    if folder.local:
        os.replace(file, folder.path(file.name))
    else:
        folder.fs.put_file(str(file), folder.path(file.name))
